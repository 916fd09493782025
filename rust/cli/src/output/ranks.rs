//! What a change of ranks did.

use std::fmt::Write;

use lorafmt_core::ops::resize::{ResizeReport, Resized};

use super::View;
use super::text::{DIM, clean, error, paint, percent};

/// Modules that are shown without `-v`.
const SHOWN: usize = 3;

/// One line on all modules, and the worst of them.
pub(super) fn ranks(report: &ResizeReport, view: &View) -> String {
    if view.quiet {
        return String::new();
    }
    let (before, after) = (span(report, |r| r.rank_before), span(report, |r| r.rank_after));
    let mut out = format!("  {} {before} -> {after}", paint(DIM, "ranks"));
    let kept = 1.0 - report.relative_error.powi(2);
    let _ = match report.relative_error {
        0.0 => writeln!(out, "  nothing of the effect is lost"),
        lost if kept > 0.0 => {
            writeln!(out, "  relative error {}, keeps {} of the energy", error(lost), percent(kept))
        }
        lost => writeln!(out, "  relative error {}", error(lost)),
    };
    let mut worst: Vec<&Resized> = report.modules.iter().filter(|r| r.relative_error > 0.0).collect();
    worst.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error).then_with(|| a.module.cmp(&b.module)));
    let shown = if view.verbose { worst.len() } else { SHOWN.min(worst.len()) };
    for r in &worst[..shown] {
        let _ = writeln!(
            out,
            "  {:>8}  {} -> {}  {}",
            error(r.relative_error),
            r.rank_before,
            r.rank_after,
            clean(&r.module)
        );
    }
    if shown < worst.len() {
        let _ = writeln!(out, "  {}", paint(DIM, format!("and {} more (-v shows all)", worst.len() - shown)));
    }
    out
}

fn span(report: &ResizeReport, of: impl Fn(&Resized) -> usize) -> String {
    let ranks: Vec<usize> = report.modules.iter().map(of).collect();
    match (ranks.iter().min(), ranks.iter().max()) {
        (Some(low), Some(high)) if low == high => low.to_string(),
        (Some(low), Some(high)) => format!("{low}..{high}"),
        _ => "none".to_owned(),
    }
}
