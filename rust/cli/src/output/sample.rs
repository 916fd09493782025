//! What sample was made.

use lorafmt_core::report::Warning;
use serde_json::{Value, json};

use super::text::{BOLD, GREEN, bytes, clean, paint, plural};
use super::{Answer, View};

/// A sample that was written, or would be.
pub(crate) struct Sampled {
    pub(crate) path: String,
    pub(crate) dialect: String,
    pub(crate) family: String,
    pub(crate) rank: usize,
    pub(crate) seed: u64,
    pub(crate) tensors: usize,
    pub(crate) bytes: u64,
    pub(crate) dry_run: bool,
}

impl Answer for Sampled {
    fn json(&self) -> Value {
        let path = (!self.dry_run).then_some(&self.path);
        let mut value = json!({
            "schema": 1,
            "target": {"path": path, "dialect": self.dialect, "bytes": self.bytes, "tensors": self.tensors},
            "family": self.family,
            "rank": self.rank,
            "seed": self.seed,
        });
        if self.dry_run {
            value["dry_run"] = true.into();
            value["target"]["planned"] = self.path.clone().into();
        }
        value
    }

    fn human(&self, view: &View) -> String {
        if view.quiet && !self.dry_run {
            return String::new();
        }
        let what = paint(GREEN, if self.dry_run { "would write" } else { "wrote" });
        let (path, tensors) = (paint(BOLD, clean(&self.path)), plural(self.tensors, "tensor", "tensors"));
        let (dialect, family, rank) = (&self.dialect, &self.family, self.rank);
        format!("{what} {path}  ({dialect}, {family}, rank {rank}, {tensors}, {})\n", bytes(self.bytes))
    }

    fn warnings(&self) -> &[Warning] {
        &[]
    }

    fn aside(&self) -> bool {
        self.path == "-" && !self.dry_run
    }
}
