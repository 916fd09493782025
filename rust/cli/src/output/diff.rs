//! How two adapters differ.

use std::fmt::Write;

use lorafmt_core::ops::{DiffReport, GroupDiff, ModuleDiff};

use super::View;
use super::text::{BOLD, DIM, GREEN, RED, clean, digits, error, or_dash, paint, plural};
use crate::args::ByArg;

/// Modules that are shown without `-v`.
const SHOWN: usize = 20;

/// The verdict and the worst modules; with `by` also the numbers of the whole and of its parts.
pub(crate) fn differences(report: &DiffReport, by: Option<ByArg>, view: &View) -> String {
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
    match by {
        Some(ByArg::Module) => each(report, &mut out),
        Some(ByArg::Block) => blocks(report, &mut out),
        None if view.verbose => blocks(report, &mut out),
        None => {}
    }
    out
}

fn blocks(report: &DiffReport, out: &mut String) {
    heading(report, out);
    for GroupDiff { component, block, norm_a, norm_b, cosine, relative_error, .. } in &report.by_block {
        let block = block.as_deref().unwrap_or("(outside of blocks)");
        let name = format!("{}.{}", clean(component), clean(block));
        let _ = writeln!(out, "{}  {name}", numbers(Some(*norm_a), Some(*norm_b), *cosine, *relative_error));
    }
}

fn each(report: &DiffReport, out: &mut String) {
    heading(report, out);
    for m in &report.by_module {
        let _ = writeln!(out, "{}  {}", numbers(m.norm_a, m.norm_b, m.cosine, m.relative_error), clean(&m.module));
    }
}

/// Names of the columns, and the whole.
fn heading(report: &DiffReport, out: &mut String) {
    let names = format!("  {:>9} {:>9} {:>8} {:>8}", "norm of A", "norm of B", "cosine", "error");
    let _ = writeln!(out, "{}", paint(DIM, names));
    let whole = numbers(Some(report.norm_a), Some(report.norm_b), report.cosine, report.relative_error);
    let count = match report.measured == report.modules {
        true => String::new(),
        false => format!(" ({} of {})", report.measured, plural(report.modules, "module", "modules")),
    };
    let _ = writeln!(out, "{whole}  {}{count}", paint(BOLD, "all together"));
}

fn numbers(a: Option<f64>, b: Option<f64>, cosine: Option<f64>, relative: f64) -> String {
    let cosine = or_dash(cosine, |c| format!("{c:.4}"));
    format!("  {:>9} {:>9} {cosine:>8} {:>8}", or_dash(a, digits), or_dash(b, digits), error(relative))
}
