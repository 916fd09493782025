//! One line a file.

use lorafmt_core::report::Warning;
use serde_json::{Value, json};

use super::text::{clean, percent};
use super::{Answer, View};

/// What a file was recognised as.
pub(crate) struct Detected {
    pub(crate) path: String,
    pub(crate) dialect: String,
    /// The dialects of the keys, with the number of keys.
    pub(crate) dialects: Vec<(String, usize)>,
    pub(crate) family: String,
    /// Which of its sizes, if the model comes in several.
    pub(crate) variant: Option<String>,
    pub(crate) families: Vec<String>,
    pub(crate) coverage: f64,
    pub(crate) tensors: usize,
    pub(crate) warnings: Vec<Warning>,
}

impl Answer for Detected {
    fn json(&self) -> Value {
        let spelling = |(dialect, keys): &(String, usize)| json!({"dialect": dialect, "keys": keys});
        json!({
            "schema": 1,
            "path": self.path,
            "dialect": self.dialect,
            "dialects": self.dialects.iter().map(spelling).collect::<Vec<_>>(),
            "family": self.family,
            "variant": self.variant,
            "families": self.families,
            "coverage": self.coverage,
            "tensors": self.tensors,
            "warnings": self.warnings,
        })
    }

    fn human(&self, view: &View) -> String {
        let (path, coverage) = (clean(&self.path), percent(self.coverage));
        if view.terminal {
            let width = view.paths;
            return format!("{path:width$}  {:10}  {:8}  {coverage:>5}\n", self.dialect, self.family);
        }
        format!("{path}\t{}\t{}\t{coverage}\n", self.dialect, self.family)
    }

    fn warnings(&self) -> &[Warning] {
        &self.warnings
    }
}
