//! What became of a checkpoint.

use std::fmt::Write;

use lorafmt_core::report::Warning;
use lorafmt_core::weights::{FuseReport, FusedTensor, UnfuseReport};
use serde_json::Value;

use super::text::{BOLD, GREEN, bytes, clean, error, paint, plural, seconds};
use super::{Answer, View};

/// Changed tensors that are shown without `-v`.
const SHOWN: usize = 5;

/// A checkpoint with adapters in it, written or planned.
pub(crate) struct Fused {
    pub(crate) report: FuseReport,
    pub(crate) output: String,
    pub(crate) dry_run: bool,
}

impl Answer for Fused {
    fn json(&self) -> Value {
        let mut value = serde_json::to_value(&self.report).unwrap_or_default();
        if let Some(object) = value.as_object_mut().filter(|_| self.dry_run) {
            object.insert("dry_run".into(), true.into());
        }
        value
    }

    fn human(&self, view: &View) -> String {
        if view.quiet && !self.dry_run {
            return String::new();
        }
        let r = &self.report;
        let verb = if self.dry_run { "would write" } else { "wrote" };
        let (verb, path) = (paint(GREEN, verb), paint(BOLD, clean(&self.output)));
        let mut parts = vec![
            plural(r.sources.len(), "adapter", "adapters"),
            r.base.family.clone(),
            plural(r.modules, "module", "modules"),
            format!("{} of {} changed", plural(r.fused.len(), "tensor", "tensors"), r.base.tensors),
        ];
        if r.base.files > 1 {
            parts.push(format!("{} of {} files rewritten", r.target.rewritten, r.base.files));
        }
        parts.extend(r.gain.map(|gain| format!("gain {gain:.3}")));
        parts.extend(r.err.map(|err| format!("largest error {}", error(err))));
        if !self.dry_run {
            parts.extend([bytes(r.target.bytes), seconds(r.seconds)]);
        }
        let mut out = format!("{verb} {path}  ({})\n", clean(&parts.join(", ")));
        if let Some(undo) = &r.undo {
            let _ = writeln!(out, "undo  {}  ({} for {})", clean(&undo.path), bytes(undo.bytes), bytes(undo.restores));
        }
        let mut worst: Vec<&FusedTensor> = r.fused.iter().collect();
        worst.sort_by(|a, b| a.gain.unwrap_or(2.0).total_cmp(&b.gain.unwrap_or(2.0)).then_with(|| a.key.cmp(&b.key)));
        let weak = |t: &&&FusedTensor| view.verbose || t.gain.is_some_and(|g| g < 0.9);
        let shown = if view.verbose { worst.len() } else { SHOWN };
        for tensor in worst.iter().filter(weak).take(shown) {
            let number = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.3}"));
            let (gain, err) = (number(tensor.gain), number(tensor.err));
            let _ = writeln!(out, "  gain {gain:>6}  error {err:>6}  {:8}  {}", tensor.dtype, clean(&tensor.key));
        }
        out
    }

    fn warnings(&self) -> &[Warning] {
        &self.report.warnings
    }
}

/// A checkpoint taken back.
pub(crate) struct Unfused {
    pub(crate) report: UnfuseReport,
    pub(crate) output: String,
}

impl Answer for Unfused {
    fn json(&self) -> Value {
        let mut value = serde_json::to_value(&self.report).unwrap_or_default();
        if let Some(object) = value.as_object_mut().filter(|_| self.report.path.is_none()) {
            object.insert("dry_run".into(), true.into());
        }
        value
    }

    fn human(&self, view: &View) -> String {
        let r = &self.report;
        let done = r.path.is_some();
        if view.quiet && done {
            return String::new();
        }
        let verb = if done { "wrote" } else { "would write" };
        let (verb, path) = (paint(GREEN, verb), paint(BOLD, clean(&self.output)));
        let restored = plural(r.tensors, "tensor", "tensors");
        let mut parts = vec![format!("{} as it was", clean(&r.base)), format!("{restored} restored"), bytes(r.bytes)];
        parts.extend(done.then(|| seconds(r.seconds)));
        format!("{verb} {path}  ({})\n", parts.join(", "))
    }

    fn warnings(&self) -> &[Warning] {
        &[]
    }
}
