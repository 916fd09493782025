//! What became of modules that were made plain LoRA.

use std::collections::BTreeMap;
use std::fmt::Write;

use lorafmt_core::ops::expand::{ExpandReport, Expanded};
use lorafmt_core::report::Warning;
use serde_json::Value;

use super::text::{clean, error, plural};
use super::{Answer, Converted, View};

/// Modules that are shown with `-v`.
const SHOWN: usize = 20;

/// A file of plain LoRA that was written or planned.
pub(crate) struct Plain(pub(crate) Converted);

impl Answer for Plain {
    fn json(&self) -> Value {
        self.0.json()
    }

    fn human(&self, view: &View) -> String {
        let mut out = self.0.human(view);
        if let Some(report) = self.0.report.expand.as_ref().filter(|_| !view.quiet) {
            out += &summary(report);
            if view.verbose {
                out += &worst(report);
            }
        }
        out
    }

    fn warnings(&self) -> &[Warning] {
        self.0.warnings()
    }

    fn aside(&self) -> bool {
        self.0.aside()
    }
}

/// `  38 modules made plain (lokr 38): rank 4 to 64, relative error 1.2e-2`.
fn summary(report: &ExpandReport) -> String {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for module in &report.modules {
        *kinds.entry(module.kind).or_default() += 1;
    }
    let kinds: Vec<String> = kinds.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    let ranks = report.modules.iter().map(|m| m.rank_after);
    let ranks = match (ranks.clone().min(), ranks.max()) {
        (Some(low), Some(high)) if low == high => format!(", rank {low}"),
        (Some(low), Some(high)) => format!(", rank {low} to {high}"),
        _ => String::new(),
    };
    let kinds = if kinds.is_empty() { String::new() } else { format!(" ({})", kinds.join(", ")) };
    let others = [(report.kept, "as they were"), (report.left_out, "left out")];
    let others = others.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!(", {n} {what}"));
    format!(
        "  {} made plain{kinds}{ranks}, relative error {}{}\n",
        plural(report.expanded, "module", "modules"),
        error(report.relative_error),
        others.collect::<String>()
    )
}

/// The modules that lost most.
fn worst(report: &ExpandReport) -> String {
    let mut modules: Vec<&Expanded> = report.modules.iter().filter(|m| m.relative_error > 0.0).collect();
    modules.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
    let mut out = String::new();
    for m in modules.iter().take(SHOWN) {
        let _ = writeln!(
            out,
            "    {:>8}  rank {} of {}  {}",
            error(m.relative_error),
            m.rank_after,
            m.rank_before,
            clean(&m.module)
        );
    }
    if modules.len() > SHOWN {
        let _ = writeln!(out, "    and {} with less", modules.len() - SHOWN);
    }
    out
}
