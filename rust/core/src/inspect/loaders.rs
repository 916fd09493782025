//! What programs make of a file as it is, and which command makes one that they load.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::adapter::Adapter;
use crate::encode::{keys, target_row};
use crate::kind::{Kind, Module};
use crate::ops::Based;
use crate::table::{Answer, Dialect, Program};

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
    let kinds = adapter.modules.values().map(|p| p.module.kind_name()).collect();
    let plain = [Kind::Lora.name()].into();
    let forms = Forms::of(adapter, &kinds, &plain);
    let mut out: Vec<Loader> = adapter.registry.programs().iter().map(|p| forms.loader(p)).collect();
    out.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

/// A form in which the adapter is or can be written.
struct Form<'a> {
    /// Number of the dialect.
    dialect: usize,
    /// The kinds of its modules.
    kinds: &'a BTreeSet<&'a str>,
    /// Its keys, one in a line, worked out where a rule asks for them.
    keys: OnceCell<String>,
}

impl<'a> Form<'a> {
    fn new(dialect: usize, kinds: &'a BTreeSet<&'a str>) -> Self {
        Self { dialect, kinds, keys: OnceCell::new() }
    }
}

/// The forms in which the adapter can be written.
struct Forms<'a> {
    adapter: &'a Adapter,
    /// As it is, if that is one dialect.
    own: Option<Form<'a>>,
    /// In dialects that have a name for every module, most usual first.
    held: Vec<Form<'a>>,
    /// The same, with all made plain LoRA that can be.
    plain: Vec<Form<'a>>,
}

impl<'a> Forms<'a> {
    fn of(adapter: &'a Adapter, kinds: &'a BTreeSet<&'a str>, plain: &'a BTreeSet<&'a str>) -> Self {
        let all = &adapter.registry.dialects;
        let named = |&d: &usize| all[d].writes(adapter.family) && names_all(adapter, &all[d]);
        let dialects: Vec<usize> = (0..all.len()).filter(named).collect();
        let written = |kinds| dialects.iter().map(|&d| Form::new(d, kinds)).collect();
        let own = adapter.detection.dialect.map(|d| {
            let names: Vec<&str> = adapter.source.tensors().iter().map(|t| t.name.as_str()).collect();
            Form { keys: OnceCell::from(names.join("\n")), ..Form::new(d, kinds) }
        });
        Self { adapter, own, held: written(kinds), plain: written(plain) }
    }

    fn loader(&self, program: &Program) -> Loader {
        let (adapter, registry) = (self.adapter, &self.adapter.registry);
        let own = self.own.as_ref().and_then(|form| self.says(program, form, |_| false));
        let held = self.better(program, &self.held, |_| false);
        let needs_weights = adapter.modules.values().any(|p| Based::needs_weight(&p.module));
        let behind = |d: usize| registry.dialects[d].native(adapter.family).is_some();
        // No one command both makes them plain by the model's weights and puts them behind a base.
        let possible = |d: &usize| adapter.has_plain_form() && !(needs_weights && behind(*d));
        let target = held.or_else(|| self.better(program, &self.plain, Module::has_plain_form).filter(possible));
        let (answer, loads) = own.unwrap_or_else(|| (Answer::No, Loader::UNKNOWN.to_owned()));
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
    fn says(&self, program: &Program, form: &Form<'_>, made: fn(&Module) -> bool) -> Option<(Answer, String)> {
        let dialect = &self.adapter.registry.dialects[form.dialect];
        let family = &self.adapter.family_table().name;
        let has = |text: &str| form.keys.get_or_init(|| keys(self.adapter, dialect, made)).contains(text);
        let rules = form.kinds.iter().filter_map(|kind| program.rule(&dialect.name, family, kind, has));
        rules.min_by_key(|rule| rule.answer).map(|rule| (rule.answer, rule.text()))
    }

    /// The first dialect that the program loads whole, and that can hold all modules but those that are `made` plain.
    fn better(&self, program: &Program, forms: &[Form<'_>], made: fn(&Module) -> bool) -> Option<usize> {
        let loads = |form: &&Form<'_>| self.says(program, form, made).is_some_and(|(answer, _)| answer == Answer::Yes);
        let modules = || self.adapter.modules.values().map(|p| &p.module).filter(|m| !made(m));
        let dialects = &self.adapter.registry.dialects;
        let holds =
            |form: &&Form<'_>| modules().all(|m| m.tensors.keys().all(|&slot| dialects[form.dialect].holds(slot)));
        forms.iter().filter(holds).find(loads).map(|form| form.dialect)
    }
}

/// Whether a dialect has a name for every module.
fn names_all(adapter: &Adapter, dialect: &Dialect) -> bool {
    let alike = adapter.modules.iter().map(|(key, p)| {
        let address = &p.address;
        ((key.component, address.row, address.part, address.namespace), (key, address))
    });
    let each: BTreeMap<_, _> = alike.collect();
    each.into_values().all(|(key, address)| {
        let place = dialect.place(adapter.family, key.component);
        place.is_some_and(|place| target_row(adapter, place, key, address).is_some())
    })
}
