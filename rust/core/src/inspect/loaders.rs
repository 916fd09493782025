//! What programs make of a file as it is, and which command makes one that they load.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::adapter::Adapter;
use crate::kind::{Kind, Module};
use crate::ops::Based;
use crate::table::{Answer, Dialect, Program, Row};

/// One program and whether it loads the file as it is.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Loader {
    /// The program.
    pub name: String,
    /// `yes`, or what goes wrong; `not known` if no source tells.
    pub loads: String,
    /// The dialect to convert to, where another one loads better.
    pub convert_to: Option<String>,
    /// Whether that takes the quantized base: to come behind its branches, or to take them off.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub needs_base: bool,
    /// Whether its modules have to be made plain LoRA on the way (`lorafmt expand`).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub expand: bool,
    /// Whether that takes the weights of the model (`--base-weights`), and mostly a rank: differences are full.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub needs_weights: bool,
}

impl Loader {
    /// What is told of a program of which nothing is known.
    pub const UNKNOWN: &str = "not known";
}

/// Every program, by name.
pub(super) fn all(adapter: &Adapter) -> Vec<Loader> {
    let forms = Forms::of(adapter);
    let mut out: Vec<Loader> = adapter.registry.programs().iter().map(|p| forms.loader(p)).collect();
    out.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

/// The forms in which the adapter can be written.
struct Forms<'a> {
    adapter: &'a Adapter,
    kinds: BTreeSet<&'a str>,
    /// Dialects that have a name for every module, most usual first.
    dialects: Vec<usize>,
}

impl<'a> Forms<'a> {
    fn of(adapter: &'a Adapter) -> Self {
        let all = &adapter.registry.dialects;
        let named = |&d: &usize| all[d].writes(adapter.family) && names_all(adapter, &all[d]);
        Self {
            adapter,
            kinds: adapter.modules.values().map(|p| p.module.kind_name()).collect(),
            dialects: (0..all.len()).filter(named).collect(),
        }
    }

    fn loader(&self, program: &Program) -> Loader {
        let (adapter, registry) = (self.adapter, &self.adapter.registry);
        let plain: BTreeSet<&str> = [Kind::Lora.name()].into();
        let own = adapter.detection.dialect.map(|d| self.says(program, d, &self.kinds));
        let held = self.better(program, &self.kinds, |_| false);
        let made = |module: &Module| module.has_plain_form();
        let needs_weights = adapter.modules.values().any(|p| Based::needs_weight(&p.module));
        let behind = |d: usize| registry.dialects[d].native(adapter.family).is_some();
        // No one command both makes them plain by the model's weights and puts them behind a base.
        let possible = |d: &usize| adapter.has_plain_form() && !(needs_weights && behind(*d));
        let target = held.or_else(|| self.better(program, &plain, made).filter(possible));
        let (answer, loads) = match own {
            Some(Some(known)) => known,
            None if target.is_some() => (Answer::No, "no: the keys are of several dialects".to_owned()),
            _ => (Answer::No, Loader::UNKNOWN.to_owned()),
        };
        let target = target.filter(|_| answer != Answer::Yes);
        let behind = target.is_some_and(behind);
        let expand = target.is_some() && held.is_none();
        Loader {
            name: program.name.clone(),
            loads,
            convert_to: target.map(|d| registry.dialects[d].name.clone()),
            needs_base: behind || target.is_some() && adapter.native.as_ref().is_some_and(|n| n.needs_base),
            // What goes behind a base is made plain on the way there.
            expand: expand && !behind,
            needs_weights: expand && needs_weights,
        }
    }

    /// Of several kinds the worst answer counts; one that is not known counts for nothing.
    fn says(&self, program: &Program, dialect: usize, kinds: &BTreeSet<&str>) -> Option<(Answer, String)> {
        let name = &self.adapter.registry.dialects[dialect].name;
        let family = &self.adapter.family_table().name;
        let rules = kinds.iter().filter_map(|kind| program.rule(name, family, kind));
        rules.min_by_key(|rule| rule.answer).map(|rule| (rule.answer, rule.text()))
    }

    /// The first dialect that the program loads whole, and that can hold all modules but those that are `made` plain.
    fn better(&self, program: &Program, kinds: &BTreeSet<&str>, made: impl Fn(&Module) -> bool) -> Option<usize> {
        let loads = |d: usize| self.says(program, d, kinds).is_some_and(|(answer, _)| answer == Answer::Yes);
        let modules = || self.adapter.modules.values().map(|p| &p.module).filter(|m| !made(m));
        let dialects = &self.adapter.registry.dialects;
        let holds = |d: usize| modules().all(|m| m.tensors.keys().all(|&slot| dialects[d].holds(slot)));
        self.dialects.iter().copied().find(|&d| loads(d) && holds(d))
    }
}

/// Whether a dialect has a name for every module.
fn names_all(adapter: &Adapter, dialect: &Dialect) -> bool {
    let rows: BTreeSet<(usize, usize, Option<usize>)> =
        adapter.modules.iter().map(|(key, p)| (key.component, p.address.row, p.address.part)).collect();
    rows.into_iter().all(|(component, own, part)| {
        let Some(place) = dialect.place(adapter.family, component) else { return false };
        let rows = &adapter.component(component).rows;
        let named = |row: &Row| place.namespace == 0 || row.names[place.namespace].is_some();
        let same = |row: &Row| match part {
            Some(part) => row.canonical.contains(&rows[own].canonical[part]),
            None => row.canonical == rows[own].canonical,
        };
        rows.iter().any(|row| named(row) && same(row))
    })
}
