//! Adapters of one key set: what one of them has and another lacks is added to the other as zeros.
//!
//! Programs that swap adapters in a compiled model need every one of them to have the same modules and the same shapes.

use std::collections::BTreeMap;

use crate::adapter::{Adapter, ModuleKey, Placed};
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Slot};
use crate::tensor::Tensor;

/// Modules and shapes that adapters have in common.
#[derive(Debug, Clone, Default)]
pub struct KeySet {
    modules: BTreeMap<ModuleKey, Placed>,
}

/// Slots that can be filled with zeros without an effect.
const NEUTRAL: [Slot; 6] = [Slot::Up, Slot::Down, Slot::DiffB, Slot::Diff, Slot::WNorm, Slot::BNorm];

impl KeySet {
    /// The modules of all adapters together, of rank 1 and zero. An error where a module cannot be zero, or has other
    /// shapes in another adapter.
    pub fn union<'a>(adapters: impl Iterator<Item = &'a Adapter>) -> Result<Self> {
        let mut set = Self::default();
        let mut owners: BTreeMap<ModuleKey, &'a Adapter> = BTreeMap::new();
        for adapter in adapters {
            for (key, placed) in &adapter.modules {
                let zero = zero(adapter, key, placed)?;
                let Some(known) = set.modules.get_mut(key) else {
                    set.modules.insert(key.clone(), zero);
                    owners.insert(key.clone(), adapter);
                    continue;
                };
                let fits = meet(&mut known.module, &zero.module);
                if !fits {
                    let other = owners.get(key).map_or(adapter, |a| a).source.path();
                    let message = format!(
                        "`{}` has other shapes, or another kind, in `{}` and in `{}`",
                        adapter.display(key),
                        other.display(),
                        adapter.source.path().display()
                    );
                    return Err(Error::new(Code::IncompatibleModules, message).at(adapter.source.path()));
                }
            }
        }
        Ok(set)
    }

    /// Number of modules.
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// The adapter with all modules of the set, and how many were added. An error for a module that the set lacks.
    pub fn complete(&self, adapter: &Adapter) -> Result<(Adapter, usize)> {
        let mut out = adapter.clone();
        if let Some(key) = adapter.modules.keys().find(|key| !self.modules.contains_key(key)) {
            let message = format!("`{}` is not among the modules that all are to have", adapter.display(key));
            return Err(Error::new(Code::UnsupportedModule, message)
                .at(adapter.source.path())
                .hint("leave out `--like`, or name an adapter that has this module"));
        }
        let mut added = 0;
        for (key, wanted) in &self.modules {
            match out.modules.get_mut(key) {
                Some(placed) => {
                    meet(&mut placed.module, &wanted.module);
                    // Every file says its scales in the same way.
                    placed.module.alpha = None;
                }
                None => {
                    added += 1;
                    out.modules.insert(key.clone(), wanted.clone());
                }
            }
        }
        Ok((out, added))
    }
}

/// The module as one of rank 1 and zero.
fn zero(adapter: &Adapter, key: &ModuleKey, placed: &Placed) -> Result<Placed> {
    let module = &placed.module;
    let odd = module.tensors.keys().find(|slot| !NEUTRAL.contains(slot));
    if odd.is_some() || !matches!(module.kind, Kind::Lora | Kind::Bias | Kind::Norm | Kind::Full) {
        let message = format!(
            "`{}` is {}, which other adapters cannot have as nothing",
            adapter.display(key),
            module.kind_name()
        );
        return Err(Error::new(Code::UnsupportedKind, message)
            .at(adapter.source.path())
            .hint("`lorafmt expand` makes plain LoRA of LoHa, LoKr, Tucker cores and DoRA"));
    }
    let mut tensors = BTreeMap::new();
    for (&slot, tensor) in &module.tensors {
        let mut shape = tensor.shape().to_vec();
        match slot {
            Slot::Down => shape[0] = 1,
            Slot::Up => shape[1] = 1,
            _ => {}
        }
        tensors.insert(slot, Tensor::zeros(tensor.dtype(), shape));
    }
    Ok(Placed { address: placed.address.clone(), module: Module::new(module.kind, tensors) })
}

/// Adds zeros for what only `other` has. Whether both have the same shapes in what both have.
fn meet(module: &mut Module, other: &Module) -> bool {
    // A bias alone goes with any layer.
    let kinds = (module.kind, other.kind);
    match kinds {
        (a, b) if a == b => {}
        (Kind::Bias, _) => module.kind = other.kind,
        (_, Kind::Bias) => {}
        _ => return false,
    }
    for (&slot, tensor) in &other.tensors {
        match module.get(slot) {
            None => drop(module.tensors.insert(slot, Tensor::zeros(tensor.dtype(), tensor.shape().to_vec()))),
            Some(mine) => {
                let (rank_free, like) =
                    (|t: &Tensor| free_of_rank(slot, t.shape()), free_of_rank(slot, tensor.shape()));
                if rank_free(mine) != like {
                    return false;
                }
            }
        }
    }
    true
}

/// A shape without its rank.
fn free_of_rank(slot: Slot, shape: &[usize]) -> Vec<usize> {
    let axis = match slot {
        Slot::Down => Some(0),
        Slot::Up => Some(1),
        _ => None,
    };
    shape.iter().enumerate().filter(|(i, _)| Some(*i) != axis).map(|(_, d)| *d).collect()
}
