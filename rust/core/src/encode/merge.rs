//! Modules of the target that a rule merges, instead of adding them up.

use rayon::prelude::*;

use super::{Draft, Encoder, Member};
use crate::error::{Code, Error, Result};
use crate::kind::{Module, Refusal};
use crate::ops::merge::{MergeOptions, MergeReport, Merged, Space, Trouble, Weighted, merge, summary};
use crate::ops::resize::{RankRule, Target};
use crate::table::Place;

/// The strength that the members of a term have in common; what one of them has beside it is put into its module.
pub(super) fn common_weight(members: &mut [Member<'_>]) -> f64 {
    let weight = members.iter().map(|m| m.weight).fold(0.0f64, |w, x| if x.abs() > w.abs() { x } else { w });
    for member in members.iter_mut().filter(|m| m.weight != weight) {
        // Kinds that have no strength are refused by every rule.
        if let Ok(module) = member.module.strengthened(member.weight / weight) {
            member.module = module;
        }
    }
    weight
}

impl<'a> Encoder<'a> {
    /// Merges the terms of every draft, many at once.
    pub(super) fn merge(&mut self, place: &Place, drafts: Vec<Draft<'a>>) -> Result<Vec<(Draft<'a>, Module)>> {
        let Some(options) = &self.options.algebra.merge else { return Ok(Vec::new()) };
        options.check(self.ledger.composition.terms().len())?;
        let rank = self.merged_rank(options)?;
        let one = |draft: &Draft<'a>| (!draft.terms.is_empty()).then(|| self.merge_draft(options, draft, rank));
        let results: Vec<Option<Result<Merged, Trouble>>> = drafts.par_iter().map(one).collect();
        let mut merged = Vec::new();
        for (draft, result) in drafts.into_iter().zip(results) {
            let modules: Vec<Module> = draft.terms.iter().map(|j| j.module.clone()).collect();
            match result {
                None => {}
                Some(Ok(Merged { module, mut report })) => {
                    report.module = format!("{}.{}", self.adapter.component(place.component).name, draft.path);
                    self.merged.push(report);
                    let module = self.widen(&draft.keys[0], draft.row, module, &modules);
                    merged.push((draft, module));
                }
                Some(Err(Trouble::NotFinite(at))) => {
                    let name = self.adapter.display(&draft.keys[0]);
                    return Err(self.not_finite(&name, &modules[at].inputs));
                }
                Some(Err(Trouble::Refused(Refusal(reason)))) => {
                    self.incompatible(&draft.keys[0], &modules, &reason)?;
                }
            }
        }
        Ok(merged)
    }

    /// Random choices go by the canonical name, so that they are the same for every target that has the module.
    fn merge_draft(&self, options: &MergeOptions, draft: &Draft<'a>, rank: Option<usize>) -> Result<Merged, Trouble> {
        let terms = draft.terms.iter().map(|j| Weighted { module: &j.module, weight: j.weight, term: j.term });
        merge(&terms.collect::<Vec<_>>(), options, &self.adapter.display(&draft.keys[0]), rank)
    }

    /// The rank that merged deltas are compressed to, if one is asked for.
    fn merged_rank(&self, options: &MergeOptions) -> Result<Option<usize>> {
        let Some(resize) = self.options.algebra.resize.as_ref().filter(|_| options.space() == Space::Delta) else {
            return Ok(None);
        };
        match resize.target {
            Target::Rule(RankRule { limit: Some(limit), .. }) => {
                Ok(resize.places.iter().map(|(_, rank)| *rank).chain([limit]).max())
            }
            _ => Err(Error::new(Code::InvalidArgument, "merged deltas have full rank, and no limit is given for it")
                .hint("add `--rank N`, which a criterion can still lower, or use `--space core`")),
        }
    }

    /// What happened to all merged modules; what deserves a word is put among the warnings.
    pub(super) fn merge_report(&mut self) -> Option<MergeReport> {
        let options = self.options.algebra.merge.as_ref()?;
        let (report, warnings) = summary(options, std::mem::take(&mut self.merged));
        self.ledger.warnings.extend(warnings);
        Some(report)
    }
}
