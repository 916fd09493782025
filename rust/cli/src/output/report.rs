//! What is told of a page beside the page.

use std::fmt::Write;
use std::path::Path;

use lorafmt_core::library::Library;
use serde_json::Value;

use super::View;
use super::text::{BOLD, CYAN, GREEN, RED, bytes, clean, clean_lines, paint, plural};

/// Files that failed which are named without `-v`.
const SHOWN: usize = 5;

/// A library that was read, and where its page is.
pub(crate) struct Surveyed<'a> {
    pub(crate) library: &'a Library,
    pub(crate) output: Option<&'a Path>,
    pub(crate) dry_run: bool,
}

impl Surveyed<'_> {
    /// The data of the page.
    pub(crate) fn json(&self) -> Value {
        let mut value = serde_json::to_value(self.library).unwrap_or_default();
        if self.dry_run {
            value["dry_run"] = true.into();
        }
        value
    }

    /// Why files could not be read; the page says so, too.
    pub(crate) fn failures(&self, view: &View) -> String {
        let mut out = String::new();
        let failed = self.library.files.iter().filter_map(|f| Some((f, f.error.as_ref()?)));
        let shown = if view.verbose { usize::MAX } else { SHOWN };
        for (file, error) in failed.take(shown) {
            let text = |field: &str| clean_lines(error[field].as_str().unwrap_or_default());
            let _ = writeln!(out, "{}: {}: {}", paint(RED, "error"), paint(BOLD, clean(&file.path)), text("message"));
            let _ = writeln!(out, "{}: {}", paint(CYAN, "hint"), text("hint"));
        }
        let rest = self.library.totals.failed.saturating_sub(shown);
        if rest > 0 {
            let _ = writeln!(
                out,
                "and {} failed (-v shows all, and so does the page)",
                plural(rest, "more file", "more files")
            );
        }
        out
    }

    pub(crate) fn human(&self, view: &View) -> String {
        if view.quiet && !self.dry_run {
            return String::new();
        }
        let t = &self.library.totals;
        let mut parts =
            vec![plural(t.files, "file", "files"), bytes(t.bytes), plural(t.families, "family", "families")];
        let mut more = |n: usize, text: String| parts.extend((n > 0).then_some(text));
        more(t.failed, format!("{} failed", t.failed));
        more(t.problems, format!("{} with problems", t.problems));
        more(t.warnings, format!("{} with warnings", t.warnings));
        more(t.duplicates, format!("{} ({})", plural(t.duplicates, "copy", "copies"), bytes(t.duplicate_bytes)));
        more(t.similar, format!("{} much alike", t.similar));
        let what = paint(GREEN, if self.dry_run { "would write" } else { "wrote" });
        let path = self.output.map_or_else(|| "-".into(), Path::to_string_lossy);
        format!("{what} {}  ({})\n", paint(BOLD, clean(&path)), parts.join(", "))
    }
}
