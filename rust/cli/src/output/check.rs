//! Whether a file is sound.

use std::fmt::Write;

use lorafmt_core::check::CheckReport;
use lorafmt_core::report::Warning;
use serde_json::Value;

use super::text::{BOLD, GREEN, RED, clean, clean_lines, paint, plural};
use super::{Answer, View};

/// Problems that are shown without `-v`.
const SHOWN: usize = 10;

impl Answer for CheckReport {
    fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    fn human(&self, view: &View) -> String {
        let path = paint(BOLD, clean(&self.path));
        let size =
            format!("{}, {}", plural(self.tensors, "tensor", "tensors"), plural(self.modules, "module", "modules"));
        if self.ok {
            return if view.quiet { String::new() } else { format!("{}  {path}  ({size})\n", paint(GREEN, "ok")) };
        }
        let problems = plural(self.problems.len(), "problem", "problems");
        let mut out = format!("{} {path}  ({problems}; {size})\n", paint(RED, "bad"));
        let shown = if view.verbose { self.problems.len() } else { SHOWN };
        let text = |problem: &Value, field: &str| clean_lines(problem[field].as_str().unwrap_or_default());
        for problem in self.problems.iter().take(shown) {
            let _ = writeln!(out, "  [{}] {}", text(problem, "code"), text(problem, "message"));
        }
        if self.problems.len() > shown {
            let _ = writeln!(out, "  and {} more (-v shows all)", self.problems.len() - shown);
        }
        out
    }

    fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    fn is_yes(&self) -> bool {
        self.ok
    }
}
