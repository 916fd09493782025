//! What the weights of a file look like.

use std::fmt::Write;

use lorafmt_core::ops::{GroupWeights, ModuleWeights, Spectrum, Status, Weights};

use super::View;
use super::inspect::{SHOWN, list, row};
use super::text::{BOLD, DIM, RED, YELLOW, clean, digits, or_dash, paint, percent, plural};

/// Characters of the longest bar.
const BAR: usize = 12;
/// Bars in eighths of a character, none to seven.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
/// A rank that keeps this much is worth to be told.
const PLENTY: f64 = 0.99;

/// The whole, its blocks, and its modules that stand out.
pub(super) fn table(weights: &Weights, out: &mut String, view: &View) {
    summary(&weights.total, out);
    blocks(weights, out, view);
    modules(weights, out, view);
    let names = |names: &[String], style| names.iter().map(|n| paint(style, clean(n))).collect::<Vec<_>>();
    list(out, "dead", &names(&weights.dead, YELLOW), view.verbose);
    list(out, "NaN, Inf", &names(&weights.not_finite, RED), view.verbose);
}

fn summary(total: &GroupWeights, out: &mut String) {
    let (stable, effective) = (or_dash(total.stable_rank, digits), or_dash(total.effective_rank, digits));
    let norm = paint(BOLD, digits(total.norm));
    let modules = plural(total.modules, "module", "modules");
    let label = |text| paint(DIM, text);
    row(
        out,
        "weights",
        &format!(
            "{} {norm} ({modules})   {} {stable}   {} {effective}",
            label("norm"),
            label("median stable rank"),
            label("effective rank")
        ),
    );
    let kept = total.energy_by_rank.iter().map(|(rank, share)| format!("{rank}: {}", percent(*share)));
    let kept: Vec<String> = kept.collect();
    if !kept.is_empty() {
        row(out, "energy", &format!("{} {}", label("kept by rank"), kept.join("   ")));
    }
    let needed = total.rank_for_energy.iter();
    let needed: Vec<String> =
        needed.map(|(share, rank)| format!("{} {rank}", percent(share.parse().unwrap_or_default()))).collect();
    if !needed.is_empty() {
        let name = if kept.is_empty() { "energy" } else { "" };
        row(out, name, &format!("{} {}", label("rank that keeps"), needed.join("   ")));
    }
    let enough = total.energy_by_rank.iter().find(|(_, share)| **share >= PLENTY);
    if let Some((rank, share)) = enough.or_else(|| total.energy_by_rank.last_key_value()) {
        let error = digits((1.0 - share).max(0.0).sqrt());
        let share = percent(*share);
        row(out, "", &format!("a resize to {rank} keeps {share} of the energy (relative error {error})"));
    }
}

/// One line a component, one a block; bars are norms, the longest that of the largest block.
fn blocks(weights: &Weights, out: &mut String, view: &View) {
    let name = |group: &GroupWeights| match &group.block {
        Some(block) => clean(block).into_owned(),
        None => "outside of blocks".to_owned(),
    };
    let names = weights.blocks.iter().map(|b| name(b).chars().count());
    let width = names.chain(weights.components.iter().map(|c| c.component.chars().count())).max().unwrap_or(0);
    let largest = weights.blocks.iter().map(|b| b.norm).fold(0.0, f64::max);
    let head =
        format!("{:width$}  {:BAR$} {:>8} {:>6} {:>7} {:>9}", "blocks", "", "norm", "share", "stable", "effective");
    let _ = writeln!(out, "{}", paint(DIM, head));
    for component in &weights.components {
        let line = |name: String, bar: String, group: &GroupWeights| {
            let (stable, effective) = (or_dash(group.stable_rank, short), or_dash(group.effective_rank, short));
            let (norm, share) = (digits(group.norm), percent(group.share));
            format!("{name}  {bar} {norm:>8} {share:>6} {stable:>7} {effective:>9}\n")
        };
        let title = paint(BOLD, format!("{:width$}", clean(&component.component)));
        out.push_str(&line(title, " ".repeat(BAR), component));
        for block in weights.blocks.iter().filter(|b| b.component == component.component) {
            let bar = bar(block.norm / largest, view.terminal);
            out.push_str(&line(format!("{:width$}", name(block)), bar, block));
        }
    }
}

/// A bar for a share of the longest, in eighths of a character where there is a terminal to show them.
fn bar(share: f64, fine: bool) -> String {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let eighths = (share * (BAR * 8) as f64).round() as usize;
    let text = match fine {
        true => format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8]),
        false => "#".repeat((eighths + 4) / 8),
    };
    format!("{text:BAR$}")
}

/// One digit behind the point.
fn short(value: f64) -> String {
    format!("{value:.1}")
}

/// The modules with most of the energy, or all with `-v`.
fn modules(weights: &Weights, out: &mut String, view: &View) {
    let mut shown: Vec<&ModuleWeights> = weights.modules.iter().collect();
    if !view.verbose {
        shown.retain(|m| m.share.is_some_and(|s| s > 0.0));
        shown.sort_by(|a, b| b.share.unwrap_or(0.0).total_cmp(&a.share.unwrap_or(0.0)));
        shown.truncate(SHOWN);
    }
    if shown.is_empty() {
        return;
    }
    let head =
        format!("{:>7} {:>8} {:>8} {:>7} {:>9}  {}", "share", "norm", "largest", "stable", "effective", "module");
    let _ = writeln!(out, "{}", paint(DIM, head));
    for module in shown {
        let of = |get: fn(&Spectrum) -> f64| module.spectrum.as_ref().map(get);
        let columns = [
            (or_dash(module.share, percent), 7),
            (or_dash(module.norm.or(module.vector_norm), digits), 8),
            (or_dash(of(|s| s.spectral_norm), digits), 8),
            (or_dash(of(|s| s.stable_rank), short), 7),
            (or_dash(of(|s| s.effective_rank), short), 9),
        ];
        let columns: Vec<String> = columns.iter().map(|(text, width)| format!("{text:>width$}")).collect();
        let _ = writeln!(out, "{}  {}{}", columns.join(" "), clean(&module.module), remark(module));
    }
}

fn remark(module: &ModuleWeights) -> String {
    let status = match module.status {
        Status::Dead => Some("does nothing"),
        Status::NotFinite => Some("holds NaN or infinities"),
        Status::Ok | Status::NormOnly | Status::Unmeasured => None,
    };
    let remarks: Vec<&str> = status.into_iter().chain(module.note).collect();
    match remarks.as_slice() {
        [] => String::new(),
        several => format!("  {}", paint(DIM, format!("({})", several.join("; ")))),
    }
}
