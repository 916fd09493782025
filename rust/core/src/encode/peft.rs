//! PEFT's `adapter_config.json` (peft: `LoraConfig`, `save_pretrained`).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Spelled;
use crate::kind::{Kind, Slot};
use crate::table::Component;

/// The configuration of the modules that PEFT loads: rank and alpha of most of them, patterns for the others.
///
/// The first component is the model itself; names of the others begin with their component's.
pub(super) fn config(spelled: &[Spelled<'_>], components: &[Component]) -> Value {
    let all: Vec<&Spelled<'_>> = spelled.iter().filter(|s| s.module.kind == Kind::Lora).collect();
    let layers: Vec<&Spelled<'_>> = all.iter().copied().filter(|s| !s.place.carried).collect();
    let paths: Vec<&str> = layers.iter().map(|s| s.path.as_str()).collect();
    let rank = |s: &Spelled<'_>| s.module.rank().unwrap_or(1);
    // A scale that is folded into the factors is 1, so alpha is the rank.
    let alpha = |s: &Spelled<'_>| if s.configured { s.module.scale * rank(s) as f64 } else { rank(s) as f64 };
    let r = most_common(layers.iter().map(|s| rank(s).to_string())).and_then(|t| t.parse::<usize>().ok()).unwrap_or(1);
    let lora_alpha =
        most_common(layers.iter().map(|s| alpha(s).to_string())).and_then(|t| t.parse().ok()).unwrap_or(r as f64);
    let named = |s: &Spelled<'_>| match s.place.component {
        0 => pattern(&s.path, &paths),
        other => format!("{}.{}", components[other].name, s.path),
    };
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    // Carried modules too: whoever reads the file again finds their scale only here.
    for s in &all {
        if rank(s) != r {
            ranks.insert(named(s), json!(rank(s)));
        }
        if alpha(s) != lora_alpha {
            alphas.insert(named(s), number(alpha(s)));
        }
    }
    json!({
        "peft_type": "LORA",
        "base_model_name_or_path": null,
        "task_type": null,
        "inference_mode": true,
        "r": r,
        "lora_alpha": number(lora_alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": targets(&paths),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": layers.iter().any(|s| s.module.get(Slot::DiffB).is_some()),
        "use_dora": layers.iter().any(|s| s.module.is_dora()),
        "use_rslora": false,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "modules_to_save": null,
    })
}

/// Whole numbers without a decimal point, as PEFT writes them.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn most_common(values: impl Iterator<Item = String>) -> Option<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().max_by(|a, b| a.1.cmp(&b.1).then_with(|| b.0.cmp(&a.0))).map(|(value, _)| value)
}

/// Whether `path` is the end of another path, which PEFT's matching by suffix would mean as well.
fn is_tail(path: &str, paths: &[&str]) -> bool {
    paths.iter().any(|other| {
        other.len() > path.len() && other.ends_with(path) && other.as_bytes()[other.len() - path.len() - 1] == b'.'
    })
}

fn pattern(path: &str, paths: &[&str]) -> String {
    if is_tail(path, paths) { format!("^{path}") } else { path.to_owned() }
}

/// A list of names, or one expression where a name of the list would match others too.
fn targets(paths: &[&str]) -> Value {
    if paths.iter().any(|p| is_tail(p, paths)) {
        let names: Vec<String> = paths.iter().map(|p| p.replace('.', "\\.")).collect();
        return json!(format!("^({})$", names.join("|")));
    }
    json!(paths)
}
