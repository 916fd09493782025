//! Modules that stood whole under a name of their own, where canonical modules stand.

use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::adapter::{Adapter, Address, ModuleKey, Placed};
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Refusal};
use crate::table::Op;
use crate::tensor::Tensor;
use crate::weights::Checkpoint;

/// Whether a module is not canonical only for its kind's sake.
fn stands_apart(address: &Address) -> bool {
    address.namespace > 0
}

/// The canonical modules that a plain one is: cut into parts, or with its halves exchanged.
fn canonical(
    adapter: &Adapter,
    key: &ModuleKey,
    address: &Address,
    module: Module,
) -> Result<Vec<(ModuleKey, Address, Module)>, Refusal> {
    let row = adapter.row(key, address);
    if !stands_apart(address) {
        return Ok(vec![(key.clone(), address.clone(), module)]);
    }
    let place = |part: usize, module: Module| {
        let path = row.canonical[part].render(&address.variables);
        let address = Address { part: Some(part), namespace: 0, ..address.clone() };
        (ModuleKey { component: key.component, path }, address, module)
    };
    match (row.op, address.part) {
        (Op::Fuse, None) => {
            let parts: Arc<[usize]> = Arc::from(row.outputs.as_slice());
            (0..parts.len()).map(|part| Ok(place(part, module.cut(&parts, part)?))).collect()
        }
        (Op::SwapHalves, _) => Ok(vec![place(0, module.swap_halves()?)]),
        _ => Ok(vec![(key.clone(), address.clone(), module)]),
    }
}

/// Puts a module into an adapter, as the canonical modules that it is. What stands there already is added.
pub(super) fn put(out: &mut Adapter, key: &ModuleKey, address: &Address, module: Module) -> Result<()> {
    let movable = module.kind == Kind::Lora;
    let placed = match canonical(out, key, address, module.clone()) {
        Ok(placed) if movable => placed,
        _ => vec![(key.clone(), address.clone(), module)],
    };
    for (key, address, module) in placed {
        match out.modules.entry(key) {
            Entry::Vacant(entry) => drop(entry.insert(Placed { address, module })),
            Entry::Occupied(mut entry) => match entry.get().module.plus(&module) {
                Ok(sum) => entry.get_mut().module = sum,
                Err(Refusal(reason)) => {
                    return Err(Error::new(Code::DuplicateModule, format!("`{}` {reason}", entry.key().path)));
                }
            },
        }
    }
    Ok(())
}

/// The adapter with those modules that stand apart and are `wanted` elsewhere as canonical ones, by their exact plain
/// form of at most `max_rank`. `None` if there is none to move.
pub(crate) fn settled(adapter: &Adapter, max_rank: usize, wanted: impl Fn(&ModuleKey) -> bool) -> Option<Adapter> {
    let moved = |key: &ModuleKey, placed: &Placed| {
        let apart = stands_apart(&placed.address) && wanted(key);
        apart.then(|| placed.module.expanded(max_rank).ok()).flatten().filter(|m| m.kind == Kind::Lora)
    };
    let plain: Vec<(&ModuleKey, &Placed, Module)> =
        adapter.modules.iter().filter_map(|(key, placed)| Some((key, placed, moved(key, placed)?))).collect();
    if plain.is_empty() {
        return None;
    }
    let mut out = adapter.clone();
    for (key, placed, module) in plain {
        out.modules.remove(key);
        // Two claims that do not add are left as they were, to be refused where they are written.
        if put(&mut out, key, &placed.address, module).is_err() {
            out.modules.insert(key.clone(), placed.clone());
        }
    }
    Some(out)
}

/// What another adapter has of a module that stands apart: its canonical parts, and the one module that they make.
/// `None` if it has none of them, or if they make none.
pub(crate) fn counterpart(
    adapter: &Adapter,
    key: &ModuleKey,
    address: &Address,
    other: &Adapter,
) -> Option<(Vec<ModuleKey>, Module)> {
    if !stands_apart(address) || other.modules.contains_key(key) {
        return None;
    }
    let row = adapter.row(key, address);
    let named =
        |part: usize| ModuleKey { component: key.component, path: row.canonical[part].render(&address.variables) };
    let module = |key: &ModuleKey| other.modules.get(key).map(|placed| &placed.module);
    match (row.op, address.part) {
        (Op::Fuse, None) => {
            let keys: Vec<ModuleKey> = (0..row.canonical.len()).map(named).collect();
            let parts: Vec<Option<&Module>> = keys.iter().map(module).collect();
            parts.iter().any(Option::is_some).then_some(())?;
            let whole = Module::fuse(&parts, &row.outputs).ok()?;
            Some((keys, whole))
        }
        (Op::SwapHalves, _) => {
            let key = named(0);
            let whole = module(&key)?.swap_halves().ok()?;
            Some((vec![key], whole))
        }
        _ => None,
    }
}

/// The weight of a module: of all its parts, stacked, where it stands for several.
pub(crate) fn weight_of(adapter: &Adapter, base: &Checkpoint, key: &ModuleKey, address: &Address) -> Option<Tensor> {
    let row = adapter.row(key, address);
    let of = |part: usize| base.weight(key.component, &row.canonical[part].render(&address.variables));
    match (row.op, address.part) {
        (Op::Fuse, None) => {
            let parts: Vec<Tensor> = (0..row.canonical.len()).map(of).collect::<Option<_>>()?;
            Some(Tensor::stack_rows(&parts))
        }
        (Op::SwapHalves, _) if stands_apart(address) => of(0)?.swap_halves(),
        (_, part) => of(part.unwrap_or(0)),
    }
}
