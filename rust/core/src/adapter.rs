//! The canonical adapter: every dialect is read into it and written from it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::detect::{Detection, other_families};
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::kind::{Kind, Module};
use crate::native::{NativeInfo, needs_base};
use crate::ops::expand::Expansion;
use crate::report::Warning;
use crate::table::pattern::Variables;
use crate::table::{Component, Dialect, Family, Registry, Row};

/// The canonical name of a module.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleKey {
    /// Number of the component in its family.
    pub component: usize,
    /// The path in the canonical namespace; in another one for a module that could not be cut (see [`Address::namespace`]).
    pub path: String,
}

/// Where in the tables a module stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Number of the row.
    pub row: usize,
    /// Which canonical module of the row; `None` for a fused module that its kind does not let cut.
    pub part: Option<usize>,
    /// The namespace of the path: 0, the canonical one, unless `part` is `None` or its rows could not be permuted.
    pub namespace: usize,
    /// Block numbers.
    pub variables: Variables,
}

/// A module and its place.
#[derive(Debug, Clone)]
pub struct Placed {
    /// Where it stands in the tables.
    pub address: Address,
    /// Its tensors and scale.
    pub module: Module,
}

/// An adapter file, understood. Holds descriptions only; tensor bytes stay where they are.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The tables it was read with.
    pub registry: Arc<Registry>,
    /// The input.
    pub source: Arc<Source>,
    /// Number of the family.
    pub family: usize,
    /// How it was recognised.
    pub detection: Detection,
    /// The modules, in canonical order.
    pub modules: BTreeMap<ModuleKey, Placed>,
    /// Input tensors that no table knows.
    pub unknown: Vec<usize>,
    /// What deserves a word.
    pub warnings: Vec<Warning>,
    /// What is special about a file of packed branches.
    pub native: Option<NativeInfo>,
    /// What it was before its modules were made plain LoRA, if they were.
    pub expansion: Option<Expansion>,
}

impl Adapter {
    /// The family's table.
    pub fn family_table(&self) -> &Family {
        &self.registry.families[self.family]
    }

    /// Families, other than its own, to whose models an input tensor belongs by name and shape.
    pub fn families_of(&self, key: &str) -> Vec<String> {
        let info = self.source.tensors().iter().find(|t| t.name == key);
        info.map_or_else(Vec::new, |info| other_families(&self.registry, info, self.family))
    }

    /// Whether some of its modules are none of plain LoRA, and all those could be.
    pub fn has_plain_form(&self) -> bool {
        let other = |p: &&Placed| p.module.kind_name() != Kind::Lora.name() || p.module.has_core();
        let accompanies = |kind: Kind| matches!(kind, Kind::Bias | Kind::Norm | Kind::Set);
        let mut others = self.modules.values().filter(other).filter(|p| !accompanies(p.module.kind)).peekable();
        others.peek().is_some() && others.all(|p| p.module.has_plain_form())
    }

    /// The dialect that it is in. An error if its keys are of several, or of one that is only read.
    pub fn own_dialect(&self) -> Result<&Dialect> {
        let refuse = |message: String| {
            let hint = "add `--to DIALECT`; `lorafmt formats` lists what can be written";
            Err(Error::new(Code::UnsupportedTarget, message).at(self.source.path()).hint(hint))
        };
        match self.detection.dialect.map(|d| &self.registry.dialects[d]) {
            None => refuse("its keys are of several dialects, so it cannot be written as what it is".to_owned()),
            Some(dialect) if !dialect.writes(self.family) => {
                refuse(format!("it is of `{}`, which can be read and not written", dialect.name))
            }
            Some(dialect) => Ok(dialect),
        }
    }

    /// The known key of its family that is most like an unknown one.
    pub fn nearest(&self, key: &str) -> Option<String> {
        self.registry.nearest_in(self.family, key)
    }

    /// The table of a component.
    pub fn component(&self, component: usize) -> &Component {
        &self.family_table().components[component]
    }

    /// The row of a module.
    pub fn row(&self, key: &ModuleKey, address: &Address) -> &Row {
        &self.component(key.component).rows[address.row]
    }

    /// An error if its modules still hold the branches of a quantized base: their deltas are not the adapter's.
    pub fn ensure_apart(&self) -> Result<()> {
        match self.native.as_ref().is_some_and(|n| n.needs_base) {
            true => Err(needs_base(self.source.path())),
            false => Ok(()),
        }
    }

    /// The name of a module with its component, for messages.
    pub fn display(&self, key: &ModuleKey) -> String {
        format!("{}.{}", self.component(key.component).name, key.path)
    }
}
