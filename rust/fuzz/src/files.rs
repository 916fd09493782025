//! Files of half-right keys and shapes, made of the tables' own fragments.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Unknown};
use lorafmt_core::decode::decode_lenient;
use lorafmt_core::detect::Given;
use lorafmt_core::dtype::Dtype;
use lorafmt_core::encode::{EncodeOptions, encode};
use lorafmt_core::inspect::inspect;
use lorafmt_core::io::{Bytes, Source, TensorInfo};
use lorafmt_core::kind::Slot;
use lorafmt_core::plan::Fate;
use lorafmt_core::table::pattern::Template;
use lorafmt_core::table::{Component, Op, Registry, Row};

use crate::bytes::{Decisions, patterned};

/// Every tensor of any file is part of a module, a note, or unknown; or the file has a problem that says so.
pub fn decode_accounts_for_every_tensor(data: &[u8]) {
    let Some((source, given)) = file(&mut Decisions(data)) else { return };
    let registry = Registry::builtin();
    let Ok((adapter, problems)) = decode_lenient(&registry, &source, &given) else { return };
    let placed = adapter.modules.values().flat_map(|p| &p.module.inputs);
    let accounted: BTreeSet<usize> = placed.chain(&adapter.unknown).copied().collect();
    for (index, info) in source.tensors().iter().enumerate() {
        assert!(accounted.contains(&index) || !problems.is_empty(), "`{}` vanished", info.name);
    }
    assert!(accounted.iter().all(|i| *i < source.tensors().len()), "a tensor that the file does not have");
    let described = inspect(&adapter, &problems);
    assert!((0.0..=1.0).contains(&described.coverage), "coverage {}", described.coverage);
    // A suggestion is made for messages; any is fine, none may panic. It is slow, so one is enough.
    if let Some(&index) = adapter.unknown.first() {
        let _ = adapter.nearest(&source.tensors()[index].name);
    }
}

/// Whatever was read is written or refused in every dialect, and in what is written every tensor has a fate.
pub fn encode_gives_every_tensor_a_fate(data: &[u8]) {
    let mut decisions = Decisions(data);
    let options = options(&mut decisions);
    let Some((source, given)) = file(&mut decisions) else { return };
    let Ok((adapter, problems)) = decode_lenient(&Registry::builtin(), &source, &given) else { return };
    if problems.is_empty() {
        for dialect in 0..adapter.registry.dialects.len() {
            encode_one(&adapter, EncodeOptions { dialect, ..options.clone() });
        }
    }
}

fn encode_one(adapter: &Adapter, options: EncodeOptions) {
    let Ok(plan) = encode(&Composition::of(adapter), &options) else { return };
    let dialect = &adapter.registry.dialects[options.dialect].name;
    let lost = plan.fates.iter().position(|f| *f == Fate::Unknown);
    let name = lost.map(|i| &adapter.source.tensors()[i].name);
    assert!(name.is_none(), "`{name:?}` has no fate in `{dialect}`");
    let count = plan.count();
    assert_eq!(count.used + count.carried + count.dropped + count.unknown, count.input, "{dialect}");
    assert!(plan.modules > 0 && !plan.outputs.is_empty(), "an empty `{dialect}` file");
    let keys: BTreeSet<&str> = plan.outputs.iter().map(|o| o.key.as_str()).collect();
    assert_eq!(keys.len(), plan.outputs.len(), "a key twice in `{dialect}`");
    for output in &plan.outputs {
        let rows = output.tensor.rows().min(2);
        let mut bytes = Vec::new();
        output.tensor.read_rows_into(0..rows, &mut bytes);
        assert_eq!(bytes.len(), rows * output.tensor.cols() * output.tensor.dtype().size(), "{}", output.key);
    }
}

fn options(decisions: &mut Decisions<'_>) -> EncodeOptions {
    EncodeOptions {
        dialect: 0,
        dtype: *decisions.pick(&[None, Some(Dtype::BF16), Some(Dtype::F16), Some(Dtype::F32)]),
        strength: *decisions.pick(&[1.0, 0.5, -0.3]),
        max_rank: *decisions.pick(&[None, Some(16)]),
        width: None,
        native: None,
        algebra: Default::default(),
        unknown: *decisions.pick(&[Unknown::Drop, Unknown::Keep]),
        lossy: decisions.once_in(2),
        sidecar: decisions.once_in(2),
    }
}

/// A component of a family with everything that can stand around its modules' names.
struct Part {
    component: Component,
    prefixes: Vec<String>,
}

fn parts() -> &'static [Part] {
    static PARTS: OnceLock<Vec<Part>> = OnceLock::new();
    PARTS.get_or_init(|| {
        let registry = Registry::builtin();
        let mut parts = Vec::new();
        for (f, family) in registry.families.iter().enumerate() {
            for (c, component) in family.components.iter().enumerate() {
                let places = registry.dialects.iter().flat_map(|d| d.places.of(f));
                let places = places.filter(|p| p.component == c);
                let prefixes: BTreeSet<String> =
                    places.flat_map(|p| p.also.iter().chain([&p.prefix])).cloned().collect();
                parts.push(Part { component: component.clone(), prefixes: prefixes.into_iter().collect() });
            }
        }
        parts
    })
}

/// How each slot is spelled somewhere, and some that no table has.
fn suffixes() -> &'static [(Slot, String)] {
    static SUFFIXES: OnceLock<Vec<(Slot, String)>> = OnceLock::new();
    SUFFIXES.get_or_init(|| {
        let registry = Registry::builtin();
        let spelled = registry.dialects.iter().flat_map(|d| {
            d.spelling.keys().filter_map(|slot| Some((*slot, d.suffix(*slot, None)?))).collect::<Vec<_>>()
        });
        let further = [
            (Slot::Down, ".lora_A.default.weight"),
            (Slot::Up, ".lora_B.default.weight"),
            (Slot::Down, "_lora.down.weight"),
            (Slot::Up, "_lora.up.weight"),
            (Slot::Set, ".scale"),
            (Slot::Magnitude, ".lora_magnitude_vector.default.weight"),
        ];
        let mut all: Vec<(Slot, String)> = spelled.chain(further.map(|(s, t)| (s, t.to_owned()))).collect();
        all.sort();
        all.dedup();
        all
    })
}

fn file(decisions: &mut Decisions<'_>) -> Option<(Arc<Source>, Given)> {
    let registry = Registry::builtin();
    let given = Given {
        families: decisions.once_in(8).then(|| decisions.below(registry.families.len())).into_iter().collect(),
        dialect: decisions.once_in(8).then(|| decisions.below(registry.dialects.len())),
        ..Given::default()
    };
    let mut tensors: Vec<(TensorInfo, Bytes)> = Vec::new();
    let mut names = BTreeSet::new();
    // One file in four is full of accidents; the others are valid but for what their modules are made of.
    let wild = decisions.once_in(4);
    // Most files are about one component behind one prefix; some change in the middle.
    let mut part = decisions.pick(parts());
    let mut prefix = decisions.pick(&part.prefixes);
    for _ in 0..1 + decisions.below(12) {
        if decisions.once_in(6) {
            part = decisions.pick(parts());
            prefix = decisions.pick(&part.prefixes);
        }
        for (info, bytes) in module(decisions, part, prefix, wild) {
            if names.insert(info.name.clone()) {
                tensors.push((info, bytes));
            }
        }
        if decisions.is_empty() {
            break;
        }
    }
    let metadata = match decisions.below(4) {
        0 => vec![("lora_alpha".to_owned(), "4".to_owned())],
        1 => vec![("ss_base_model_version".to_owned(), Registry::builtin().families[0].name.clone())],
        _ => vec![],
    };
    Some((Arc::new(Source::from_tensors(Path::new("fuzz"), metadata, tensors).ok()?), given))
}

/// The tensors of one module: slots of one kind or any, shapes as the table wants them or nearly so.
fn module(decisions: &mut Decisions<'_>, part: &Part, prefix: &str, wild: bool) -> Vec<(TensorInfo, Bytes)> {
    let row = decisions.pick(&part.component.rows);
    let (path, output) = path(decisions, &part.component, row, wild);
    let path = if prefix.ends_with('_') { path.replace('.', "_") } else { path };
    let width = if row.inputs.is_empty() { 1 } else { *decisions.pick(&row.inputs) };
    let rank = 1 + decisions.below(4);
    let fitting: &[&[Slot]] = if row.op == Op::Only && !wild { ONLY } else { ANY };
    let slots = *decisions.pick(fitting);
    let mut out = Vec::new();
    // One choice of spelling for all slots, so that `lora_down` mostly meets `lora_up`.
    let choice = decisions.byte();
    for &wanted in slots {
        let mut slot = wanted;
        if wild && decisions.once_in(40) {
            slot = *decisions.pick(Slot::ALL);
        }
        if wild && decisions.once_in(40) {
            continue;
        }
        let spellings: Vec<&String> = suffixes().iter().filter(|(s, _)| *s == slot).map(|(_, t)| t).collect();
        let Some(suffix) = spellings.get(usize::from(choice) % spellings.len().max(1)) else { continue };
        let mut key = format!("{prefix}{path}{suffix}");
        let mut shape = shape(decisions, slot, output, width, rank);
        if wild {
            key = mutated(decisions, key);
            shape = distorted(decisions, shape);
        }
        let dtype = match decisions.below(16) {
            0 if wild || slot == Slot::Alpha => Dtype::I64,
            1 => Dtype::F8E4M3,
            2 => Dtype::F64,
            n if n < 9 => Dtype::BF16,
            _ => Dtype::F32,
        };
        out.extend(patterned(key, dtype, shape));
    }
    out
}

const ONLY: &[&[Slot]] = &[&[Slot::Set], &[Slot::WNorm], &[Slot::WNorm, Slot::BNorm], &[Slot::Diff], &[Slot::DiffB]];

const ANY: &[&[Slot]] = &[
    &[Slot::Down, Slot::Up],
    &[Slot::Down, Slot::Up, Slot::Alpha],
    &[Slot::Down, Slot::Up, Slot::Magnitude],
    &[Slot::Down, Slot::Up, Slot::MagnitudeIn, Slot::Alpha],
    &[Slot::Down, Slot::Up, Slot::Bias],
    &[Slot::Down, Slot::Up, Slot::DiffB],
    &[Slot::Down, Slot::Up, Slot::Mid],
    &[Slot::Down, Slot::Up, Slot::Reshape],
    &[Slot::HadaW1A, Slot::HadaW1B, Slot::HadaW2A, Slot::HadaW2B, Slot::Alpha],
    &[Slot::LokrW1, Slot::LokrW2, Slot::Alpha],
    &[Slot::LokrW1A, Slot::LokrW1B, Slot::LokrW2],
    &[Slot::LokrW1, Slot::LokrW2A, Slot::LokrW2B, Slot::Alpha],
    &[Slot::Set],
    &[Slot::WNorm, Slot::BNorm],
    &[Slot::DiffB],
    &[Slot::OftBlocks, Slot::Alpha],
    &[Slot::GloraA1, Slot::GloraA2, Slot::GloraB1, Slot::GloraB2],
    &[Slot::Ia3Weight, Slot::Ia3OnInput],
    &[Slot::Reshape],
    &[Slot::Alpha],
];

fn path(decisions: &mut Decisions<'_>, component: &Component, row: &Row, wild: bool) -> (String, usize) {
    let canonical = decisions.below(row.canonical.len());
    let mut names: Vec<(&Template, usize, Option<&String>)> =
        vec![(&row.canonical[canonical], row.outputs[canonical.min(row.outputs.len() - 1)], row.params[0].as_ref())];
    for (namespace, name) in row.names.iter().enumerate().skip(1) {
        names.extend(name.as_ref().map(|t| (t, row.output(), row.params[namespace].as_ref())));
    }
    let (template, output, param) = *decisions.pick(&names);
    let bounds = template.bounds();
    let numbers: Vec<u32> = (0..component.variables.len())
        .map(|v| {
            let past = u32::from(wild && decisions.once_in(60));
            let below = bounds.get(&v).copied().unwrap_or(1) + past;
            decisions.below(below as usize) as u32
        })
        .collect();
    let mut path = template.render(&numbers);
    if let Some(param) = param.filter(|_| decisions.once_in(2)) {
        path = format!("{path}.{param}");
    }
    if wild && decisions.once_in(12) {
        path = format!("{path}.{}", decisions.below(5));
    }
    (path, output)
}

fn shape(decisions: &mut Decisions<'_>, slot: Slot, output: usize, width: usize, rank: usize) -> Vec<usize> {
    match slot {
        Slot::Down | Slot::HadaW1B | Slot::HadaW2B => vec![rank, width],
        Slot::Up | Slot::HadaW1A | Slot::HadaW2A => vec![output, rank],
        Slot::Mid => vec![rank, rank],
        Slot::Magnitude if decisions.once_in(2) => vec![output, 1],
        Slot::Bias | Slot::DiffB | Slot::Magnitude | Slot::WNorm | Slot::BNorm => vec![output],
        Slot::Set if width == 1 => vec![output],
        Slot::Set | Slot::Diff => vec![output, width],
        Slot::MagnitudeIn => vec![1, width],
        Slot::LokrW1 => vec![8, width / 8],
        Slot::LokrW1A => vec![8, rank],
        Slot::LokrW1B => vec![rank, width / 8],
        Slot::LokrW2 => vec![output / 8, 8],
        Slot::LokrW2A => vec![output / 8, rank],
        Slot::LokrW2B => vec![rank, 8],
        Slot::Alpha => vec![],
        Slot::Reshape => vec![2],
        _ => vec![rank, 8],
    }
}

/// The shape, or another one.
fn distorted(decisions: &mut Decisions<'_>, right: Vec<usize>) -> Vec<usize> {
    match decisions.below(48) {
        0 => vec![],
        1 => vec![0],
        2 => vec![decisions.below(5), decisions.below(5)],
        3 => right.iter().rev().copied().collect(),
        4 => right.iter().copied().chain([1, 1]).collect(),
        5 => right.iter().map(|n| n * 2).collect(),
        6 => right.iter().map(|n| n.saturating_sub(1)).collect(),
        7 => right.iter().map(|_| 0).collect(),
        8 => right.iter().skip(1).copied().chain([0]).collect(),
        9 => vec![1; 4],
        _ => right,
    }
}

/// The key, or one with a small accident.
fn mutated(decisions: &mut Decisions<'_>, key: String) -> String {
    let at = |decisions: &mut Decisions<'_>| {
        let mut at = decisions.below(key.len() + 1);
        while !key.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    match decisions.below(64) {
        0 => {
            let at = at(decisions);
            format!("{}{}", &key[..at], &key[(at + 1).min(key.len())..])
        }
        1 => {
            let at = at(decisions);
            let insert = decisions.pick(&[".", "_", "0", "99999999999", "é", "#", "{double}", "lora_", ""]);
            format!("{}{insert}{}", &key[..at], &key[at..])
        }
        2 => key.replacen('.', "_", 1 + decisions.below(4)),
        3 => key.replace('_', "."),
        4 => key[..at(decisions)].to_owned(),
        5 => key[at(decisions)..].to_owned(),
        6 => format!("{key}{key}"),
        7 => key.to_uppercase(),
        _ => key,
    }
}
