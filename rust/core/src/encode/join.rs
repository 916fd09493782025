//! One module of the target out of the canonical modules of one term, and out of those of all terms.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Draft, Encoder, Joined, MAX_RANK, Member, Members, merge};
use crate::adapter::ModuleKey;
use crate::error::{Code, Result};
use crate::kind::{Kind, Module, Refusal, Slot};
use crate::native::entry_name;
use crate::plan::Fate;
use crate::table::pattern::Template;
use crate::table::{Dialect, Op, Place, Row};
use crate::tensor::Tensor;

impl<'a> Encoder<'a> {
    /// What every term makes of its members.
    pub(super) fn join_terms(
        &mut self,
        place: &Place,
        dialect: &Dialect,
        row: &'a Row,
        members: Members<'a>,
    ) -> Result<Vec<Joined>> {
        let key = members[0].key;
        let mut terms: Vec<Vec<Member<'a>>> = Vec::new();
        for member in members {
            match terms.last_mut() {
                Some(term) if term[0].term == member.term => term.push(member),
                _ => terms.push(vec![member]),
            }
        }
        let alone = terms.len() == 1 && self.options.algebra.merge.is_none();
        let mut joined: Vec<Joined> = Vec::new();
        for mut members in terms {
            let (term, weight) = (members[0].term, merge::common_weight(&mut members));
            let Some(module) = self.join(place, row, members, alone)? else { continue };
            let module = self.without_bias(dialect, key, module)?.tightened();
            joined.push(Joined { term, module, weight });
        }
        let bare = |j: &Joined| j.module.kind == Kind::Bias;
        if !dialect.holds(Slot::DiffB) && !joined.iter().all(bare) {
            // The others do without it.
            for bias in joined.extract_if(.., |j| bare(j)) {
                self.lose(Code::UnsupportedKind, key, &bias.module, "has a bias, which it cannot hold")?;
            }
        }
        Ok(joined)
    }

    /// The one module that all terms make together.
    pub(super) fn add_up(&mut self, draft: &Draft<'a>) -> Result<Option<Module>> {
        let (key, row) = (&draft.keys[0], draft.row);
        let owners: Vec<_> = draft.terms.iter().map(|j| (j.term, j.module.rank())).collect();
        let mut modules: Vec<Module> = draft.terms.iter().map(|j| j.module.clone()).collect();
        match self.branches.as_mut().and_then(|b| b.draft.as_mut()) {
            Some(draft) => draft.outside(&entry_name(self.adapter, key), &owners),
            None => modules = Module::distinct(modules),
        }
        let sum = match modules.as_slice() {
            [] => return Ok(None),
            [one] => Ok(one.clone()),
            several => Module::sum(&several.iter().collect::<Vec<_>>()),
        };
        match sum {
            Ok(module) => Ok(Some(self.widen(key, row, module, &modules))),
            Err(Refusal(reason)) => self.incompatible(key, &modules, &reason),
        }
    }

    /// Modules that do not go together.
    pub(super) fn incompatible(&mut self, key: &ModuleKey, modules: &[Module], reason: &str) -> Result<Option<Module>> {
        for module in &modules[1..] {
            self.ledger.mark(module, Fate::Dropped);
        }
        let reason = format!("{reason} ({})", self.names_of(key));
        self.lose(Code::IncompatibleModules, key, &modules[0], &reason)?;
        Ok(None)
    }

    /// The files that have a module.
    pub(super) fn names_of(&self, key: &ModuleKey) -> String {
        let terms = self.ledger.composition.terms().iter().filter(|t| t.adapter.modules.contains_key(key));
        terms.map(|t| format!("`{}`", t.adapter.source.path().display())).collect::<Vec<_>>().join(" and ")
    }

    /// Widens the inputs with zeros to the width that was asked for, and notes where a wider term has done so.
    pub(super) fn widen(&mut self, key: &ModuleKey, row: &Row, mut module: Module, terms: &[Module]) -> Module {
        let width = |m: &Module| m.get(Slot::Down).map_or(0, Tensor::cols);
        let wanted = self.options.width.filter(|w| row.inputs.len() > 1 && row.inputs.contains(w));
        if let (Some(wanted), Some(down)) = (wanted, module.tensors.get_mut(&Slot::Down))
            && down.cols() < wanted
        {
            *down = down.padded(down.rows(), wanted);
        }
        let have = width(&module);
        if terms.iter().any(|m| width(m) != 0 && width(m) < have) {
            self.widened.push(format!("{} to {have}", self.adapter.display(key)));
        }
        module
    }

    /// The one module that the members of a term make under the row's name in the target namespace.
    fn join(&mut self, place: &Place, row: &'a Row, members: Members<'a>, alone: bool) -> Result<Option<Module>> {
        let limit = self.options.max_rank.or((!alone || self.branches.is_some()).then_some(MAX_RANK));
        let Member { key, address, module: first, .. } = &members[0];
        let plain = match limit {
            Some(limit) => first.expanded(limit),
            None => Ok(first.clone()),
        };
        let joined = plain.and_then(|first| match (address.namespace, place.namespace) {
            // Its kind did not let it be made canonical, and the target wants it so: hear the reason again.
            (1.., 0) => match row.op {
                Op::Fuse => refused_cut(row, &first),
                _ => first.swap_halves(),
            },
            _ if members.len() > 1 && members.iter().any(|m| m.address.namespace > 0) => {
                Err(Refusal("is claimed twice: whole and in parts".to_owned()))
            }
            (1.., _) => Ok(first),
            (0, 0) => Ok(first.tightened()),
            (0, _) => match row.op {
                Op::Rename | Op::Only => Ok(first.tightened()),
                Op::SwapHalves => first.swap_halves(),
                Op::Fuse => fuse(row, &members, limit),
            },
        });
        match joined {
            Ok(module) => Ok(Some(module)),
            Err(Refusal(reason)) => {
                let key = *key;
                for member in &members[1..] {
                    self.ledger.mark(&member.module, Fate::Dropped);
                }
                self.lose(Code::UnsupportedKind, key, &members[0].module, &reason)?;
                Ok(None)
            }
        }
    }

    /// A bias that the dialect cannot hold is left out by itself, if losses are allowed: the layer does without it.
    fn without_bias(&mut self, dialect: &Dialect, key: &ModuleKey, mut module: Module) -> Result<Module> {
        if dialect.holds(Slot::DiffB) || module.kind == Kind::Bias {
            return Ok(module);
        }
        if let Some(bias) = module.tensors.remove(&Slot::DiffB) {
            let own = bias.inputs();
            let mut lost = Module::new(Kind::Bias, BTreeMap::from([(Slot::DiffB, bias)]));
            let terms = self.ledger.composition.terms();
            let numbered = |i: &usize| terms.iter().any(|t| own.iter().any(|o| t.number(*o) == *i));
            lost.inputs = module.inputs.iter().copied().filter(numbered).collect();
            self.lose(Code::UnsupportedKind, key, &lost, "has a bias, which it cannot hold")?;
            module.inputs.retain(|input| !lost.inputs.contains(input));
        }
        Ok(module)
    }
}

fn fuse(row: &Row, members: &[Member<'_>], limit: Option<usize>) -> Result<Module, Refusal> {
    let mut parts: Vec<Option<Module>> = vec![None; row.canonical.len()];
    for member in members {
        let named = |t: &Template| t.render(&member.address.variables) == member.key.path;
        let part = row.canonical.iter().position(named).expect("the row was found by this name");
        parts[part] = Some(match limit {
            Some(limit) => member.module.expanded(limit)?,
            None => member.module.clone(),
        });
    }
    Module::fuse(&parts.iter().map(Option::as_ref).collect::<Vec<_>>(), &row.outputs)
}

/// Why a fused module stayed whole: the reason of the first part that cannot be cut. Others of its parts may well be
/// cut, so asking for one of them is not enough.
fn refused_cut(row: &Row, module: &Module) -> Result<Module, Refusal> {
    let parts: Arc<[usize]> = Arc::from(row.outputs.as_slice());
    let refused = (0..parts.len()).find_map(|part| module.cut(&parts, part).err());
    Err(refused.unwrap_or_else(|| Refusal("cannot be cut into parts".to_owned())))
}
