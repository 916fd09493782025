//! A run over a library: bars while it goes, a line for each failure, a summary.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use lorafmt_core::batch::{Entry, Observer, Outcome, Record, Stop, Summary};
use lorafmt_core::io::Control;
use serde_json::Value;

use super::text::{BOLD, RED, YELLOW, bytes, clean, paint, plural, seconds, shortened};
use super::{Output, say};
use crate::interrupt;

/// Lines of workers that a terminal has room for.
const MOST_LINES: usize = 8;

/// Looks on while a run goes, and tells.
pub(crate) struct Watch {
    json: bool,
    quiet: bool,
    bars: Option<Bars>,
    /// One line at a time goes to standard output.
    printing: Mutex<()>,
}

struct Bars {
    all: MultiProgress,
    total: ProgressBar,
    workers: Mutex<Vec<ProgressBar>>,
    bytes: AtomicU64,
    failed: AtomicU64,
    started: Instant,
}

impl Watch {
    pub(crate) fn new(out: &Output, files: u64) -> Self {
        let bars = out.progress.then(|| Bars::new(files));
        Self { json: out.json, quiet: out.view.quiet, bars, printing: Mutex::new(()) }
    }

    fn tell(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.all.suspend(|| say(text)),
            None => say(text),
        }
    }
}

impl Observer for Watch {
    fn begin(&self, worker: usize, source: &str) -> Arc<Control> {
        if let Some(bars) = &self.bars {
            bars.begin(worker, source);
        }
        interrupt::control()
    }

    fn end(&self, worker: usize, record: &Record) {
        if let Some(bars) = &self.bars {
            bars.end(worker, record);
        }
        if self.json {
            let _one = self.printing.lock().unwrap_or_else(PoisonError::into_inner);
            super::line(&serde_json::to_value(record).unwrap_or_default());
        } else if record.outcome == Outcome::Failed {
            self.tell(&failure(record));
        } else if !self.quiet && !record.warnings.is_empty() {
            let codes: std::collections::BTreeSet<&str> = record.warnings.iter().map(|w| w.code.as_str()).collect();
            let codes = codes.into_iter().collect::<Vec<_>>().join(", ");
            self.tell(&format!("{}: {}: {codes}\n", paint(YELLOW, "warning"), clean(&record.source)));
        }
    }

    fn stopped(&self) -> bool {
        interrupt::stopped()
    }
}

/// The error and what helps, as other commands print them.
fn failure(record: &Record) -> String {
    let text = |key: &str| record.error.as_ref().and_then(|e| e.get(key)).and_then(Value::as_str).unwrap_or_default();
    let named = format!("{}: {}: {}\n", paint(RED, "error"), clean(&record.source), clean(text("message")));
    match text("hint") {
        "" => named,
        hint => format!("{named}hint: {}\n", clean(hint)),
    }
}

impl Bars {
    fn new(files: u64) -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        let total = all.add(ProgressBar::new(files));
        let style = "{wide_bar} {pos}/{len} files  {per_sec}  {msg}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            total.set_style(style.progress_chars("=> "));
        }
        total.enable_steady_tick(Duration::from_millis(200));
        let (bytes, failed) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { all, total, workers: Mutex::default(), bytes, failed, started: Instant::now() }
    }

    fn begin(&self, worker: usize, source: &str) {
        if worker >= MOST_LINES {
            return;
        }
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        while workers.len() <= worker {
            let bar = self.all.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("  {wide_msg}") {
                bar.set_style(style);
            }
            workers.push(bar);
        }
        workers[worker].set_message(shortened(&clean(source), 100).to_string());
    }

    fn end(&self, worker: usize, record: &Record) {
        let written = self.bytes.fetch_add(record.bytes, Ordering::Relaxed) + record.bytes;
        let failed = self.failed.fetch_add(u64::from(record.outcome == Outcome::Failed), Ordering::Relaxed)
            + u64::from(record.outcome == Outcome::Failed);
        let rate = written as f64 / self.started.elapsed().as_secs_f64().max(1e-3);
        let failures = if failed > 0 { format!("  {failed} failed") } else { String::new() };
        self.total.set_message(format!("{}/s{failures}", bytes(rate as u64)));
        self.total.inc(1);
        if let Some(bar) = self.workers.lock().unwrap_or_else(PoisonError::into_inner).get(worker) {
            bar.set_message("");
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        let _ = self.all.clear();
    }
}

impl Output {
    /// Prints how a run went.
    pub(crate) fn summary(&mut self, summary: &Summary, others: u64) {
        if self.json {
            let mut value = serde_json::to_value(summary).unwrap_or_default();
            value["other_files"] = others.into();
            super::line(&value);
            return;
        }
        let parts = [
            (summary.done, "done"),
            (summary.linked, "with the content of another one"),
            (summary.unchanged, "unchanged"),
            (summary.skipped, "no adapters"),
            (summary.failed, "failed"),
            (summary.left, "left"),
        ];
        let said = parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
        let said = said.collect::<Vec<_>>().join(", ");
        let rate = summary.files.saturating_sub(summary.left) as f64 / summary.seconds.max(1e-9);
        let files = plural(summary.files as usize, "file", "files");
        let wrote = format!("{} in {}, {rate:.0} files/s", bytes(summary.bytes), seconds(summary.seconds));
        let mut text = format!("{}: {said}  ({wrote})\n", paint(BOLD, files));
        text.push_str(match summary.stopped {
            None => "",
            Some(Stop::Interrupted) => "interrupted; run the command again to go on\n",
            Some(Stop::TooManyFailures) => "stopped: too many failures; run the command again to go on\n",
            Some(Stop::DiskFull) => "stopped: no space left; free some and run the command again to go on\n",
        });
        self.note(&text);
    }

    /// Prints what would become of a file.
    pub(crate) fn planned(&mut self, entry: &Entry) {
        if self.json {
            super::line(&serde_json::to_value(entry).unwrap_or_default());
            return;
        }
        let text = match &entry.problem {
            Some(problem) => format!("{}  cannot be read: {}\n", clean(&entry.source), clean(problem)),
            None => format!("{} -> {}\n", clean(&entry.source), clean(&Path::new(&entry.output).to_string_lossy())),
        };
        self.answer(&text);
    }
}
