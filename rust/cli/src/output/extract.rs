//! What an adapter was extracted from, and how much of it.

use std::fmt::Write;

use lorafmt_core::report::Warning;
use lorafmt_core::weights::{ExtractReport, Extracted};
use serde_json::Value;

use super::text::{clean, plural};
use super::{Answer, Converted, View};

/// Modules that are shown without `-v`.
const SHOWN: usize = 5;

/// An adapter that was extracted.
pub(crate) struct ExtractedAdapter {
    pub(crate) converted: Converted,
    pub(crate) report: ExtractReport,
}

impl Answer for ExtractedAdapter {
    fn json(&self) -> Value {
        let mut value = self.converted.json();
        if let Some(object) = value.as_object_mut() {
            object.insert("extract".into(), serde_json::to_value(&self.report).unwrap_or_default());
        }
        value
    }

    fn human(&self, view: &View) -> String {
        let mut out = self.converted.human(view);
        if view.quiet {
            return out;
        }
        let r = &self.report;
        let _ = writeln!(
            out,
            "{}, ranks up to {}, relative error {:.3}; {} unchanged",
            plural(r.modules.len(), "weight", "weights"),
            r.max_rank,
            r.relative_error,
            r.unchanged
        );
        let mut worst: Vec<&Extracted> = r.modules.iter().collect();
        worst.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error).then_with(|| a.module.cmp(&b.module)));
        for m in worst.iter().take(if view.verbose { worst.len() } else { SHOWN }) {
            let _ = writeln!(out, "  rank {:>4}  error {:.3}  {}", m.rank, m.relative_error, clean(&m.module));
        }
        out
    }

    fn warnings(&self) -> &[Warning] {
        self.converted.warnings()
    }

    fn aside(&self) -> bool {
        self.converted.aside()
    }
}
