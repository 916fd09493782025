//! Small valid files of a toy family, through every toy dialect and back.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use lorafmt_core::Code;
use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::Composition;
use lorafmt_core::convert::{ConvertOptions, open, plan};
use lorafmt_core::io::{Bytes, Control, Layout, Source, TensorInfo, write_to};
use lorafmt_core::kind::Slot;
use lorafmt_core::ops::diff;
use lorafmt_core::table::{Dialect, Op, Place, Registry, Row};

use crate::bytes::{Decisions, floats};

const TABLES: [&str; 5] = [
    include_str!("../tables/toy.toml"),
    include_str!("../tables/toy-split.toml"),
    include_str!("../tables/toy-fused.toml"),
    include_str!("../tables/toy-flat.toml"),
    include_str!("../tables/toy-partial.toml"),
];

/// All values are positive, so nothing cancels and one rounding of a float32 stays far below this.
const TOLERANCE: f64 = 1e-6;

/// A file is one adapter in every dialect that takes it; plain LoRA is taken by all that name all modules.
pub fn round_trip_keeps_deltas(data: &[u8]) {
    let registry = registry();
    let family = registry.family("toy").expect("a toy table");
    let toys: Vec<&Dialect> = registry.dialects.iter().filter(|d| d.writes(family)).collect();
    let mut decisions = Decisions(data);
    let from = *decisions.pick(&toys);
    let (tensors, plain) = file(&mut decisions, registry, from, family);
    if tensors.is_empty() {
        return;
    }
    let source = Source::from_tensors(Path::new("toy"), vec![], tensors).expect("sizes fit");
    let adapter = read(source).unwrap_or_else(|e| panic!("a valid `{}` file is not read: {e}", from.name));
    assert!(adapter.unknown.is_empty(), "a valid `{}` file has unknown keys", from.name);
    for to in toys {
        let complete = to.name != "toy-partial";
        through(&adapter, from, to, plain && complete);
    }
}

fn registry() -> &'static Arc<Registry> {
    static REGISTRY: OnceLock<Arc<Registry>> = OnceLock::new();
    REGISTRY.get_or_init(|| Registry::with_tables(&TABLES.map(str::to_owned)).expect("the toy tables are valid"))
}

fn read(source: Source) -> lorafmt_core::Result<Adapter> {
    let options = ConvertOptions { family: Some("toy".to_owned()), ..ConvertOptions::default() };
    open(registry(), source, &options, None)
}

fn through(adapter: &Adapter, from: &Dialect, to: &Dialect, must_work: bool) {
    let way = format!("`{}` to `{}`", from.name, to.name);
    let options = ConvertOptions { to: to.name.clone(), ..ConvertOptions::default() };
    let plan = match plan(&Composition::of(adapter), &options, false) {
        Ok(plan) => plan,
        Err(error) => {
            let refused = matches!(error.code(), Code::UnsupportedKind | Code::UnsupportedModule | Code::NoModules);
            assert!(refused && !must_work, "{way}: {error}");
            return;
        }
    };
    let count = plan.count();
    assert_eq!(count.used + count.carried, count.input, "{way}: {count:?}");
    let mut bytes = Vec::new();
    write_to(&mut bytes, &Layout::new(&plan.outputs, &plan.metadata), &Control::default()).expect("memory is writable");
    let source = Source::from_bytes(Path::new("again"), Box::new(bytes)).expect("the output is a valid file");
    let again = read(source).unwrap_or_else(|e| panic!("{way}: the output is not read: {e}"));
    assert!(again.unknown.is_empty(), "{way}: the output has unknown keys");
    let report = diff(adapter, &again, TOLERANCE).expect("one family");
    assert!(report.equal, "{way}: {:?}", report.differences);
}

type Tensors = Vec<(TensorInfo, Bytes)>;

/// A valid file of a dialect, and whether it holds nothing but factors and alphas.
///
/// Some files mix the names of all namespaces behind the dialect's prefix; modules claimed twice add up, which only
/// plain LoRA does.
fn file(decisions: &mut Decisions<'_>, registry: &Registry, dialect: &Dialect, family: usize) -> (Tensors, bool) {
    let (mut tensors, mut plain, mut seen) = (Tensors::new(), true, BTreeSet::new());
    let (sparse, mixed) = (decisions.once_in(3), decisions.once_in(3));
    for place in dialect.places.of(family).iter().filter(|p| p.write) {
        let component = &registry.families[family].components[place.component];
        let every = 0..component.namespaces.len();
        let own = place.namespace..place.namespace + 1;
        for (namespace, row) in
            if mixed { every } else { own }.flat_map(|n| component.rows.iter().map(move |row| (n, row)))
        {
            for (part, block) in (0..row.canonical.len()).flat_map(|part| [(part, 0), (part, 1)]) {
                let module = Module { dialect, place, row, namespace, part, block, sparse, mixed };
                // Modules outside the blocks have no second instance, and some stand in several rows.
                if module.base().is_some_and(|base| seen.insert(base)) && decisions.once_in(2) {
                    plain &= module.push(decisions, &mut tensors);
                }
            }
        }
    }
    (tensors, plain)
}

struct Module<'a> {
    dialect: &'a Dialect,
    place: &'a Place,
    row: &'a Row,
    namespace: usize,
    part: usize,
    block: u32,
    sparse: bool,
    mixed: bool,
}

impl Module<'_> {
    fn base(&self) -> Option<String> {
        let other = self.row.names[self.namespace].as_ref().filter(|_| !self.mixed || self.row.op != Op::Only);
        let path = if self.namespace == 0 { self.row.canonical.get(self.part) } else { other }?.render(&[self.block]);
        let path = if self.place.prefix.ends_with('_') { path.replace('.', "_") } else { path };
        Some(format!("{}{path}", self.place.prefix))
    }

    fn key(&self, slot: Slot) -> Option<String> {
        let suffix = self.dialect.suffix(slot, self.row.params[self.namespace].as_deref())?;
        Some(self.base()? + &suffix)
    }

    /// Output rows of each part that the module holds.
    fn outputs(&self) -> &[usize] {
        if self.namespace == 0 { &self.row.outputs[self.part..=self.part] } else { &self.row.outputs }
    }

    /// Adds the module's tensors; false if there is more than plain LoRA.
    fn push(&self, decisions: &mut Decisions<'_>, out: &mut Tensors) -> bool {
        let output: usize = self.outputs().iter().sum();
        let input = self.row.inputs.first().copied().unwrap_or(0);
        let kind = if self.mixed { 23 } else { decisions.below(24) };
        let mut push = |decisions: &mut Decisions<'_>, slot: Slot, shape: Vec<usize>| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| value(decisions)).collect();
            match self.key(slot) {
                Some(key) => out.push(floats(key, shape, &values)),
                None => return false,
            }
            true
        };
        if self.row.op == Op::Only {
            let slot = if kind % 2 == 0 { Slot::Set } else { Slot::WNorm };
            push(decisions, slot, vec![output]);
            return false;
        }
        let rank = 1 + decisions.below(3);
        let spells = |slot: Slot| self.dialect.spelling.contains_key(&slot);
        match kind {
            0 if spells(Slot::HadaW1A) => {
                for (a, b) in [(Slot::HadaW1A, Slot::HadaW1B), (Slot::HadaW2A, Slot::HadaW2B)] {
                    push(decisions, a, vec![output, rank]);
                    push(decisions, b, vec![rank, input]);
                }
                push(decisions, Slot::Alpha, vec![]);
                false
            }
            1 if spells(Slot::LokrW1) => {
                push(decisions, Slot::LokrW1, vec![output / 4, 2]);
                if decisions.once_in(2) {
                    push(decisions, Slot::LokrW2, vec![4, input / 2]);
                } else {
                    push(decisions, Slot::LokrW2A, vec![4, rank]);
                    push(decisions, Slot::LokrW2B, vec![rank, input / 2]);
                }
                push(decisions, Slot::Alpha, vec![]);
                false
            }
            2 if spells(Slot::Diff) => {
                push(decisions, Slot::Diff, vec![output, input]);
                false
            }
            3 if spells(Slot::DiffB) || spells(Slot::Bias) => {
                push(decisions, if spells(Slot::DiffB) { Slot::DiffB } else { Slot::Bias }, vec![output]);
                false
            }
            _ => {
                self.push_lora(decisions, out, rank, input);
                let extra = match kind {
                    4 => [(Slot::Magnitude, vec![output]), (Slot::DiffB, vec![output])],
                    5 => [(Slot::MagnitudeIn, vec![1, input]), (Slot::Bias, vec![output])],
                    _ => return true,
                };
                let mut plain = true;
                for (slot, shape) in extra {
                    let values: Vec<f32> = (0..shape.iter().product()).map(|_| value(decisions)).collect();
                    if let Some(key) = self.key(slot) {
                        out.push(floats(key, shape, &values));
                        plain = false;
                    }
                }
                plain
            }
        }
    }

    /// Factors, block-diagonal if the file is so, and an alpha more often than not.
    fn push_lora(&self, decisions: &mut Decisions<'_>, out: &mut Tensors, rank: usize, input: usize) {
        let parts = self.outputs();
        let (blocks, total) = if self.sparse { (parts.len(), rank * parts.len()) } else { (1, rank) };
        let mut up = Vec::new();
        for (part, rows) in parts.iter().enumerate() {
            for _ in 0..*rows {
                up.extend((0..total).map(|k| if blocks > 1 && k / rank != part { 0.0 } else { value(decisions) }));
            }
        }
        let down: Vec<f32> = (0..total * input).map(|_| value(decisions)).collect();
        let keys = (self.key(Slot::Down), self.key(Slot::Up), self.key(Slot::Alpha));
        let (Some(down_key), Some(up_key), alpha_key) = keys else { return };
        out.push(floats(down_key, vec![total, input], &down));
        out.push(floats(up_key, vec![parts.iter().sum(), total], &up));
        if let Some(key) = alpha_key.filter(|_| !decisions.once_in(3)) {
            out.push(floats(key, vec![], &[value(decisions) * 8.0]));
        }
    }
}

/// From 1/8 to 8.
fn value(decisions: &mut Decisions<'_>) -> f32 {
    (1 + decisions.below(64)) as f32 / 8.0
}
