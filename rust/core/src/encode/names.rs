//! What a dialect calls the modules of an adapter.

use std::collections::BTreeMap;

use crate::adapter::{Adapter, Address, ModuleKey};
use crate::kind::{Kind, Module, Slot};
use crate::table::pattern::Variables;
use crate::table::{AlphaPolicy, Dialect, Place, Row};

/// The row under which a module is written, and which part of it in the canonical namespace, where every part
/// stands by itself. A module that several rows have belongs to the first, so that those of all terms meet.
pub(crate) fn target_row(
    adapter: &Adapter,
    place: &Place,
    key: &ModuleKey,
    address: &Address,
) -> Option<(usize, Option<usize>)> {
    let rows = &adapter.component(place.component).rows;
    let canonical = place.namespace == 0;
    let named = |row: &Row| canonical || row.names[place.namespace].is_some();
    let Some(part) = address.part.filter(|_| address.namespace == 0) else {
        // What could not be cut stays whole: another name for the same modules, stacked in the same order, will do.
        let own = &rows[address.row];
        let same = |row: &Row| row.op == own.op && row.canonical == own.canonical && named(row);
        let row = if named(own) { address.row } else { rows.iter().position(same)? };
        return Some((row, address.part.filter(|_| canonical)));
    };
    let template = &adapter.row(key, address).canonical[part];
    let row = rows.iter().position(|row| named(row) && row.canonical.contains(template))?;
    Some((row, rows[row].canonical.iter().position(|t| t == template).filter(|_| canonical)))
}

/// The path of a module under its row, or under one part of that.
pub(super) fn path(
    place: &Place,
    row: &Row,
    part: Option<usize>,
    variables: &Variables,
    canonical: &ModuleKey,
) -> String {
    match part {
        Some(part) => row.canonical[part].render(variables),
        // A fused module that could not be cut has no name where parts stand; joining it is refused elsewhere.
        None => row.names[place.namespace].as_ref().map_or_else(|| canonical.path.clone(), |t| t.render(variables)),
    }
}

/// The keys that an adapter would have in a dialect, one in a line, of those modules that have a name there; `plain`
/// tells which of them are made plain LoRA on the way. Reads no tensor. Keys of parts that are joined come repeatedly.
pub(crate) fn keys(adapter: &Adapter, dialect: &Dialect, plain: impl Fn(&Module) -> bool) -> String {
    // Many modules are of one row: component, row, part and namespace, and where those are in the target.
    type Own = (usize, usize, Option<usize>, usize);
    type There = Option<(usize, Option<usize>)>;
    let mut known: BTreeMap<Own, There> = BTreeMap::new();
    let mut out = String::new();
    for (key, placed) in &adapter.modules {
        let Some(place) = dialect.place(adapter.family, key.component) else { continue };
        let address = &placed.address;
        let row = known
            .entry((key.component, address.row, address.part, address.namespace))
            .or_insert_with(|| target_row(adapter, place, key, address));
        let Some((row, part)) = *row else { continue };
        let row = &adapter.component(key.component).rows[row];
        let base = place.key(&path(place, row, part, &address.variables, key));
        let speller = adapter.registry.speller(dialect, place);
        let param = row.params[place.namespace].as_deref();
        for suffix in slots(&placed.module, speller, plain(&placed.module)).filter_map(|s| speller.suffix(s, param)) {
            out.extend([&base, &suffix, "\n"]);
        }
    }
    out
}

/// The slots that a module has in a dialect; those that it has no suffix for are among them.
fn slots<'a>(module: &'a Module, dialect: &'a Dialect, plain: bool) -> impl Iterator<Item = Slot> + 'a {
    let factors: &[Slot] = if plain { &[Slot::Down, Slot::Up] } else { &[] };
    let own = module.tensors.keys().copied().filter(move |&slot| !plain || slot == Slot::DiffB);
    let scaled = plain || module.rank().is_some() || module.alpha.is_some();
    let alpha = scaled && (dialect.alpha == AlphaPolicy::Tensor || !plain && module.kind != Kind::Lora);
    let spelled = |slot| match slot {
        Slot::DiffB if !dialect.spelling.contains_key(&slot) => Slot::Bias,
        slot => slot,
    };
    factors.iter().copied().chain(own.map(spelled)).chain(alpha.then_some(Slot::Alpha))
}
