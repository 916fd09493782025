//! The scale of a module: alpha tensor, then header metadata, then `adapter_config.json`, then the rank.
//!
//! scale = alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732), where
//! rank is what the factors have, not what a configuration claims. The per-module tensor wins over everything else.

use std::collections::BTreeMap;
use std::path::Path;

use regex_lite::Regex;
use serde_json::Value;

use crate::dtype::read_f64;
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::kind::AlphaSource;

/// A configuration of one component, or of all.
#[derive(Debug, Clone)]
struct Scope {
    /// The component it is about; `None` for every one.
    component: Option<String>,
    origin: AlphaSource,
    alpha: Option<f64>,
    patterns: Vec<(Pattern, f64)>,
    rslora: bool,
}

/// A module pattern as PEFT matches it: the whole name or its end, and dots stand for themselves or any character.
#[derive(Debug, Clone)]
enum Pattern {
    Tail(String),
    Expression(Regex),
}

impl Pattern {
    fn parse(text: &str) -> Result<Self> {
        let special = |c: char| "^$*+?()[]{}|\\".contains(c);
        if !text.contains(special) {
            return Ok(Pattern::Tail(text.to_owned()));
        }
        Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).map(Pattern::Expression).map_err(|e| {
            let message = format!("the pattern `{text}` of `alpha_pattern` is not understood: {e}");
            Error::new(Code::InvalidConfig, message).hint("write it without look-around, or name the modules")
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Pattern::Tail(tail) => {
                path.strip_suffix(tail.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))
            }
            Pattern::Expression(expression) => expression.is_match(path),
        }
    }
}

/// Everything a file says about scales outside its tensors.
#[derive(Debug, Clone, Default)]
pub struct AlphaConfig {
    scopes: Vec<Scope>,
    /// The factor that PEFT puts on a LoKr of two full factors, whose shapes tell no rank.
    full_lokr: Option<f64>,
}

/// The scale of one module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// The factor on the delta.
    pub value: f64,
    /// Where it was found.
    pub source: AlphaSource,
    /// What the next source in order says, where it says something else.
    pub conflict: Option<f64>,
    /// The alpha tensor was zero, which trainers read as "equal to the rank".
    pub zero: bool,
}

/// Metadata keys that hold one alpha for a whole file, most explicit first.
const PLAIN_KEYS: [&str; 3] = ["lora_alpha", "network_alpha", "alpha"];

/// What kohya's trainers note of the alpha they were started with. Never used: their files hold alpha tensors, every
/// loader reads a module without one at scale 1, and tools that fold the scale leave this entry behind.
const NOTED_ALPHA: &str = "ss_network_alpha";

/// Metadata entries that stop being true once the scale is folded into the factors.
pub fn is_alpha_metadata(key: &str) -> bool {
    let tail = key.rsplit('.').next().unwrap_or(key);
    PLAIN_KEYS.contains(&tail)
        || key == NOTED_ALPHA
        || matches!(key, "lora_adapter_metadata" | "adapter_config" | "use_rslora")
}

impl AlphaConfig {
    /// Reads the header's metadata and, if given, the text of an `adapter_config.json`.
    pub fn read(source: &Source, config: Option<(&Path, &str)>) -> Result<Self> {
        let mut scopes = Vec::new();
        let mut full_lokr = None;
        if let Some(text) = source.metadata_value("lora_adapter_metadata") {
            let json = parse_json(text).map_err(|e| e.key("lora_adapter_metadata").at(source.path()))?;
            let named = |e: Error| e.key("lora_adapter_metadata").at(source.path());
            // Of a whole pipeline the options carry the component's name, of a single model they do not.
            scopes.extend(by_component(&json).map_err(named)?);
            scopes.extend(scope(None, AlphaSource::Metadata, |name| json.get(name).cloned()).map_err(named)?);
        }
        if let Some(text) = source.metadata_value("adapter_config") {
            let json = parse_json(text).map_err(|e| e.key("adapter_config").at(source.path()))?;
            let read = scope(None, AlphaSource::Metadata, |name| json.get(name).cloned());
            scopes.extend(read.map_err(|e| e.key("adapter_config").at(source.path()))?);
        }
        scopes.extend(plain(source.metadata()));
        if let Some((path, text)) = config {
            let json = parse_json(text).map_err(|e| e.at(path))?;
            scopes.extend(scope(None, AlphaSource::Config, |name| json.get(name).cloned()).map_err(|e| e.at(path))?);
            let number = |name: &str| json.get(name).and_then(as_number);
            if json.get("peft_type").and_then(Value::as_str) == Some("LOKR") {
                full_lokr = number("alpha").zip(number("r")).map(|(alpha, r)| alpha / r);
            }
        }
        Ok(Self { scopes, full_lokr })
    }

    /// The factor on a LoKr of two full factors; other trainers than PEFT have none.
    pub fn full_lokr(&self) -> Option<f64> {
        self.full_lokr
    }

    /// The scale of a module of `rank` that the file calls `path` (without prefix), with or without an alpha tensor.
    pub fn resolve(&self, component: &str, path: &str, rank: usize, tensor: Option<f64>) -> Scale {
        // Beside the model itself stand encoders, whose layers may bear equal names: there the component decides.
        let whole = format!("{component}.{path}");
        let configured = self.scopes.iter().find_map(|scope| {
            if scope.component.as_deref().is_some_and(|c| c != component) {
                return None;
            }
            let pattern = scope.patterns.iter().find(|(p, _)| p.matches(path) || p.matches(&whole));
            let alpha = pattern.map(|(_, alpha)| *alpha).or(scope.alpha)?;
            let divisor = if scope.rslora { (rank as f64).sqrt() } else { rank as f64 };
            Some((alpha / divisor, scope.origin))
        });
        match (tensor, configured) {
            (Some(alpha), configured) if alpha != 0.0 => {
                let value = alpha / rank as f64;
                let conflict = configured.map(|(other, _)| other).filter(|other| (other / value - 1.0).abs() > 1e-3);
                Scale { value, source: AlphaSource::Tensor, conflict, zero: false }
            }
            (zero, Some((value, source))) => Scale { value, source, conflict: None, zero: zero.is_some() },
            (zero, None) => Scale { value: 1.0, source: AlphaSource::Rank, conflict: None, zero: zero.is_some() },
        }
    }
}

fn parse_json(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::new(Code::InvalidConfig, format!("not valid JSON: {e}")))
}

/// diffusers' `lora_adapter_metadata`: keys are `<component>.<PEFT option>`.
fn by_component(json: &Value) -> Result<Vec<Scope>> {
    let mut components: BTreeMap<&str, BTreeMap<&str, &Value>> = BTreeMap::new();
    for (key, value) in json.as_object().into_iter().flatten() {
        if let Some((component, option)) = key.split_once('.') {
            components.entry(component).or_default().insert(option, value);
        }
    }
    let scopes = components.into_iter().filter_map(|(component, options)| {
        scope(Some(component), AlphaSource::Metadata, |name| options.get(name).map(|v| (*v).clone())).transpose()
    });
    scopes.collect()
}

/// One PEFT configuration, if it says anything about scales. LoRA calls it `lora_alpha`, LoHa and LoKr `alpha`.
fn scope(component: Option<&str>, origin: AlphaSource, get: impl Fn(&str) -> Option<Value>) -> Result<Option<Scope>> {
    let number = |name: &str| get(name).and_then(|v| as_number(&v));
    let alpha = number("lora_alpha").or_else(|| number("alpha"));
    let patterns: Vec<(Pattern, f64)> = match get("alpha_pattern") {
        Some(Value::Object(map)) => {
            let numbers = map.iter().filter_map(|(k, v)| Some((k, as_number(v)?)));
            numbers.map(|(k, v)| Ok((Pattern::parse(k)?, v))).collect::<Result<_>>()?
        }
        _ => Vec::new(),
    };
    let rslora = get("use_rslora").is_some_and(|v| v == Value::Bool(true));
    if alpha.is_none() && patterns.is_empty() {
        return Ok(None);
    }
    Ok(Some(Scope { component: component.map(str::to_owned), origin, alpha, patterns, rslora }))
}

/// `lora_alpha` and its like as entries of their own, for a component (`transformer.lora_alpha`) or the whole file.
fn plain(metadata: &[(String, String)]) -> Vec<Scope> {
    let rslora = |scope: &str| {
        let key = if scope.is_empty() { "use_rslora".to_owned() } else { format!("{scope}.use_rslora") };
        metadata.iter().any(|(k, v)| *k == key && v.eq_ignore_ascii_case("true"))
    };
    let mut found: Vec<(usize, Scope)> = Vec::new();
    for (key, value) in metadata {
        let (component, tail) = key.rsplit_once('.').unwrap_or(("", key));
        let Some(order) = PLAIN_KEYS.iter().position(|k| *k == tail) else { continue };
        let Ok(alpha) = value.trim().parse::<f64>() else { continue };
        if !alpha.is_finite() || alpha == 0.0 {
            continue;
        }
        let scope = Scope {
            component: (!component.is_empty()).then(|| component.to_owned()),
            origin: AlphaSource::Metadata,
            alpha: Some(alpha),
            patterns: Vec::new(),
            rslora: rslora(component),
        };
        found.push((if component.is_empty() { order + PLAIN_KEYS.len() } else { order }, scope));
    }
    found.sort_by_key(|(order, _)| *order);
    found.into_iter().map(|(_, scope)| scope).collect()
}

fn as_number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// The alpha that the header notes for the trainer's information, if it differs from the rank noted beside it.
pub fn noted_alpha(source: &Source) -> Option<f64> {
    let number = |key: &str| source.metadata_value(key)?.trim().parse::<f64>().ok();
    let alpha = number(NOTED_ALPHA)?;
    (number("ss_network_dim") != Some(alpha)).then_some(alpha)
}

/// The value of an alpha tensor: one finite number of any type.
pub fn read_alpha(source: &Source, index: usize) -> Result<f64> {
    let info = &source.tensors()[index];
    let fail = |message: String| Err(Error::new(Code::InvalidAlpha, message).key(&info.name).at(source.path()));
    let bytes = source.bytes(index);
    if bytes.len() != info.dtype.size() {
        return fail(format!("`{}` has shape {:?}; an alpha is one number", info.name, info.shape));
    }
    let value = read_f64(info.dtype, bytes);
    if !value.is_finite() {
        return fail(format!("`{}` is {value}", info.name));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(metadata: &[(&str, &str)]) -> Source {
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Source::from_tensors(Path::new("test"), metadata, vec![]).expect("no tensors")
    }

    fn resolve(metadata: &[(&str, &str)], config: Option<&str>, path: &str, rank: usize, tensor: Option<f64>) -> Scale {
        let config = config.map(|text| (Path::new("adapter_config.json"), text));
        AlphaConfig::read(&source(metadata), config).expect("valid").resolve("transformer", path, rank, tensor)
    }

    #[test]
    fn order_of_sources() {
        let meta = [("lora_alpha", "8")];
        let config = Some(r#"{"lora_alpha": 4}"#);
        let s = resolve(&meta, config, "a.b", 16, Some(32.0));
        assert_eq!((s.value, s.source, s.conflict), (2.0, AlphaSource::Tensor, Some(0.5)));
        assert_eq!(resolve(&meta, config, "a.b", 16, None).source, AlphaSource::Metadata);
        assert_eq!(resolve(&[], config, "a.b", 16, None).value, 0.25);
        assert_eq!(resolve(&[], None, "a.b", 16, None).source, AlphaSource::Rank);
        assert_eq!(resolve(&[], None, "a.b", 16, Some(0.0)).value, 1.0);
    }

    #[test]
    fn patterns_and_rslora() {
        let config =
            Some(r#"{"lora_alpha": 16, "use_rslora": true, "alpha_pattern": {"attn.to_q": 4, "blocks\\.1\\..*": 8}}"#);
        assert_eq!(resolve(&[], config, "blocks.0.attn.to_q", 16, None).value, 1.0);
        assert_eq!(resolve(&[], config, "blocks.1.attn.to_k", 16, None).value, 2.0);
        assert_eq!(resolve(&[], config, "blocks.0.xattn.to_q", 16, None).value, 4.0);
    }

    #[test]
    fn metadata_of_a_single_model_has_no_component() {
        let meta = [("lora_adapter_metadata", r#"{"r": 4, "lora_alpha": 32}"#)];
        assert_eq!(resolve(&meta, None, "a", 4, None).value, 8.0);
        // LoHa's and LoKr's configurations say `alpha`.
        assert_eq!(resolve(&[], Some(r#"{"peft_type": "LOHA", "alpha": 16}"#), "a", 4, None).value, 4.0);
    }

    #[test]
    fn a_pattern_that_is_not_understood_is_an_error() {
        let meta = source(&[("lora_adapter_metadata", r#"{"alpha_pattern": {"(?!x)q": 2}}"#)]);
        let error = AlphaConfig::read(&meta, None).expect_err("look-around");
        assert_eq!(error.code(), Code::InvalidConfig);
        assert!(error.message().contains("(?!x)q"));
    }

    #[test]
    fn components_of_diffusers_metadata() {
        let meta = [("lora_adapter_metadata", r#"{"transformer.lora_alpha": 32, "text_encoder.lora_alpha": 1}"#)];
        assert_eq!(resolve(&meta, None, "a", 16, None).value, 2.0);
        let broken = source(&[("lora_adapter_metadata", "{")]);
        assert_eq!(AlphaConfig::read(&broken, None).expect_err("broken").code(), Code::InvalidConfig);
    }
}
