//! How two adapters differ.

use std::fmt::Write;

use lorafmt_core::ops::{DiffReport, ModuleDiff};

use super::View;
use super::text::{BOLD, GREEN, RED, clean, error, paint, plural};

/// Modules that are shown without `-v`.
const SHOWN: usize = 20;

/// The verdict and the worst modules.
pub(crate) fn differences(report: &DiffReport, view: &View) -> String {
    let above = |m: &&ModuleDiff| m.relative_error > report.tolerance;
    let worse = report.differences.iter().filter(above).count();
    let names = format!("{} {}", paint(BOLD, clean(&report.a)), paint(BOLD, clean(&report.b)));
    let modules = plural(report.modules, "module", "modules");
    let largest =
        format!("largest relative error {}, tolerance {}", error(report.max_relative_error), error(report.tolerance));
    let mut out = match report.equal {
        true => format!("{} {names}  ({modules}, {largest})\n", paint(GREEN, "same")),
        false => format!("{} {names}  ({worse} of {modules}, {largest})\n", paint(RED, "differ")),
    };
    if view.quiet {
        return out;
    }
    let mut shown: Vec<&ModuleDiff> = report.differences.iter().filter(|m| view.verbose || above(m)).collect();
    shown.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error).then_with(|| a.module.cmp(&b.module)));
    let limit = if view.verbose { shown.len() } else { SHOWN };
    for module in shown.iter().take(limit) {
        let _ = writeln!(out, "  {:>8}  {:12}  {}", error(module.relative_error), module.state, clean(&module.module));
    }
    if shown.len() > limit {
        let _ = writeln!(out, "  and {} more (-v shows all)", shown.len() - limit);
    }
    out
}
