//! Which modules a base can take up, and where.

use std::collections::BTreeMap;

use super::Assembler;
use crate::encode::Member;
use crate::error::Result;
use crate::kind::{Module, Refusal, Slot};
use crate::native::base::BaseLayer;
use crate::native::scaling::{divide_rows, divide_vector};
use crate::table::Row;

/// What a base makes of a canonical module.
pub(super) enum Claim<'a> {
    /// It is in a layer.
    Layer(&'a BaseLayer),
    /// It could be in a layer, but the base left it as it was.
    Outside,
    /// It would be in a layer that the base does not have.
    Absent,
    /// It is quantized, and has no branch.
    Closed,
}

impl<'a> Assembler<'_, '_, 'a> {
    /// What the base makes of every canonical module that it does not leave as it is.
    pub(super) fn claims(&self) -> BTreeMap<String, Claim<'a>> {
        let mut claims = BTreeMap::new();
        for (layer, variables, name) in self.instances() {
            let held = self.base.layer(&name);
            for module in &layer.modules {
                let path = module.render(&variables);
                // A file has branches for all quantized layers of its base.
                let left = self.native.whole && self.base.is_carried();
                let plain = left || [&name, &path].iter().any(|n| self.base.has(&format!("{n}.weight")) == Some(true));
                let claim = match held {
                    Some(layer) => Claim::Layer(layer),
                    None if plain => Claim::Outside,
                    None => Claim::Absent,
                };
                claims.insert(path, claim);
            }
        }
        for module in &self.native.closed {
            let instances = self.component.instances_of(module);
            claims.extend(instances.iter().map(|v| (module.render(v), Claim::Closed)));
        }
        claims
    }

    /// Why a module cannot be added to this base, if it cannot.
    pub(super) fn unfit(
        &self,
        row: &Row,
        paths: &[String],
        claimed: &[&Claim<'a>],
        module: &Module,
    ) -> Option<&'static str> {
        if claimed.iter().any(|claim| matches!(claim, Claim::Closed)) {
            return Some("is quantized without a low-rank branch there: nothing can be added to it");
        }
        if claimed.iter().any(|claim| matches!(claim, Claim::Absent)) {
            return Some("is of a block that the base does not have");
        }
        let param = row.params[0].as_deref().unwrap_or("weight");
        let lacks = |name: &str| paths.iter().any(|path| self.base.has(&format!("{path}.{name}")) == Some(false));
        if claimed.is_empty() && lacks(param) {
            return Some("is not in the base");
        }
        let of_layer = |claim: &&Claim<'a>| match claim {
            Claim::Layer(layer) => Some(layer.bias.is_none()),
            _ => None,
        };
        let unbiased = claimed.iter().find_map(of_layer).unwrap_or_else(|| lacks("bias"));
        let strict = self.native.whole && !self.base.is_carried();
        (strict && unbiased && module.get(Slot::DiffB).is_some())
            .then_some("has a bias, its layer in the base has none")
    }

    /// A module whose outputs the base wants divided, so that they are.
    pub(super) fn divided<'m>(&mut self, mut member: Member<'m>) -> Result<Option<Member<'m>>> {
        let Some(factor) = self.fed.get(&member.key.path).cloned() else { return Ok(Some(member)) };
        match self.plain(&member) {
            Err((code, Refusal(reason))) => {
                self.lose(code, member.key, &member.module, &reason)?;
                return Ok(None);
            }
            Ok(parts) => member.module = parts.into_iter().map(|(_, module)| module).next().unwrap_or(member.module),
        }
        divide_rows(&mut member.module, &factor);
        if let Some(bias) = member.module.tensors.get_mut(&Slot::DiffB) {
            *bias = divide_vector(bias, &factor);
        }
        Ok(Some(member))
    }
}
