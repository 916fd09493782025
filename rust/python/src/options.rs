//! Keyword arguments, which cross the border as JSON.

use std::sync::Arc;

use lorafmt_core::compose::Unknown;
use lorafmt_core::convert::ConvertOptions;
use lorafmt_core::dtype::Dtype;
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::native::{Base, Layout, NativeOptions, Precision};
use serde_json::Value;

/// Options of a conversion, from the keyword arguments that Python collected as JSON.
pub(crate) fn parse(json: &str) -> Result<ConvertOptions> {
    let bad = |what: String| Error::new(Code::InvalidArgument, what);
    let value: Value = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
    let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    let count = |name: &str| value.get(name).and_then(Value::as_u64).map(|n| n as usize);
    let word = |name: &str, choices: &[&str]| -> Result<String> {
        let have = text(name).unwrap_or_else(|| choices[0].to_owned());
        if choices.contains(&have.as_str()) {
            return Ok(have);
        }
        Err(bad(format!("`{name}` is `{have}`")).hint(format!("one of: {}", choices.join(", "))))
    };
    Ok(ConvertOptions {
        to: text("to").unwrap_or_default(),
        from: text("from"),
        family: text("family"),
        dtype: match word("dtype", &["keep", "bf16", "fp16", "fp32"])?.as_str() {
            "bf16" => Some(Dtype::BF16),
            "fp16" => Some(Dtype::F16),
            "fp32" => Some(Dtype::F32),
            _ => None,
        },
        strength: value.get("strength").and_then(Value::as_f64).unwrap_or(1.0),
        unknown: match word("unknown", &["error", "drop", "keep"])?.as_str() {
            "drop" => Unknown::Drop,
            "keep" => Unknown::Keep,
            _ => Unknown::Error,
        },
        lossy: word("lossy", &["error", "allow"])? == "allow",
        max_rank: count("max_rank"),
        width: count("widen"),
        ..ConvertOptions::default()
    })
}

/// The options of branches behind a base.
pub(crate) fn native(json: &str, base: &Arc<Base>, describe: bool) -> Result<NativeOptions> {
    let value: Value = serde_json::from_str(json).unwrap_or_default();
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let bad = |name: &str, have: &str, known: &str| {
        Error::new(Code::InvalidArgument, format!("`{name}` is `{have}`")).hint(format!("one of: {known}"))
    };
    let layout = match text("layout") {
        None => Layout::default(),
        Some(name) => Layout::from_name(name).ok_or_else(|| bad("layout", name, "aligned, packed"))?,
    };
    let precision =
        text("precision").map(|name| Precision::from_name(name).ok_or_else(|| bad("precision", name, "int4, fp4")));
    Ok(NativeOptions { base: Arc::clone(base), layout, precision: precision.transpose()?, describe })
}
