//! What is done to the modules of the target between joining and writing: a rule that merges them, another rank.

use super::{Encoder, Spelled};
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Slot};
use crate::ops::merge::MergeOptions;
use crate::ops::resize::{Item, Method, Problem, Resize};
use crate::tensor::Tensor;

/// What is done to every module of the target.
#[derive(Debug, Clone, Default)]
pub struct Algebra {
    /// A rule that merges the terms, in place of their sum.
    pub merge: Option<MergeOptions>,
    /// Another rank.
    pub resize: Option<Resize>,
}

impl Algebra {
    /// Whether nothing is done.
    pub fn is_none(&self) -> bool {
        self.resize.is_none() && self.merge.is_none()
    }

    /// An error for options that make no sense.
    pub fn check(&self) -> Result<()> {
        self.resize.as_ref().map_or(Ok(()), Resize::check)
    }
}

impl<'a> Encoder<'a> {
    /// Resizes every module that has a rank.
    pub(super) fn resize(&mut self, spelled: &mut [Spelled<'a>]) -> Result<()> {
        let Some(resize) = &self.options.algebra.resize else { return Ok(()) };
        let mut places = Vec::new();
        for (at, s) in spelled.iter().enumerate() {
            match resizable(&s.module, resize) {
                Ok(true) => places.push(at),
                Ok(false) => {}
                Err((reason, hint)) => return Err(self.cannot(s, reason, hint)),
            }
        }
        if places.is_empty() {
            return Err(Error::new(Code::NoModules, "no module has a rank")
                .at(self.adapter.source.path())
                .hint("`lorafmt inspect` shows what the file holds"));
        }
        self.note_magnitudes(spelled);
        let mut items = Vec::new();
        for s in spelled.iter_mut().filter(|s| matches!(resizable(&s.module, resize), Ok(true))) {
            let name = format!("{}.{}", self.adapter.component(s.place.component).name, s.path);
            let rank = resize.places.iter().rev().find(|(selector, _)| {
                s.keys.iter().any(|key| {
                    selector.matches(&self.adapter.component(key.component).name, key.component == 0, &key.path)
                })
            });
            items.push(Item { name, module: &mut s.module, rank: rank.map(|(_, rank)| *rank) });
        }
        for (selector, _) in &resize.places {
            self.ledger.note_unmatched(selector);
        }
        let result = resize.run(&mut items);
        drop(items);
        match result {
            Ok((report, warnings)) => {
                self.ledger.warnings.extend(warnings);
                self.resized = Some(report);
                Ok(())
            }
            Err(Problem::Error(error)) => Err(error),
            Err(Problem::NotFinite(at)) => {
                let s = &spelled[places[at]];
                Err(self.not_finite(&self.name_of(s), &s.module.inputs))
            }
        }
    }

    /// DoRA's magnitude belongs to the direction that it was trained with.
    fn note_magnitudes(&mut self, spelled: &[Spelled<'a>]) {
        let dora = spelled.iter().filter(|s| s.module.is_dora()).count();
        if dora > 0 {
            let detail =
                format!("{dora} modules are DoRA: the errors are those of their factors, before the magnitude");
            self.ledger.warnings.push(crate::report::Warning::new("dora-direction", None, detail));
        }
    }

    fn cannot(&self, s: &Spelled<'a>, reason: String, hint: &str) -> Error {
        let error = Error::new(Code::UnsupportedKind, format!("`{}` {reason}", self.name_of(s))).hint(hint);
        match s.module.inputs.first().and_then(|&i| self.ledger.composition.tensor(i)) {
            Some((source, key)) => error.at(source.path()).key(key),
            None => error.at(self.adapter.source.path()),
        }
    }

    /// Names the first tensor of a module that holds NaN or infinities.
    pub(super) fn not_finite(&self, name: &str, inputs: &[usize]) -> Error {
        let spoiled = inputs.iter().find_map(|&number| {
            let (source, key) = self.ledger.composition.tensor(number)?;
            let index = source.tensors().iter().position(|t| t.name == key)?;
            let info = &source.tensors()[index];
            let bytes = source.bytes(index).chunks_exact(info.dtype.size());
            let bad = bytes.map(|b| crate::dtype::read_f64(info.dtype, b)).any(|v| !v.is_finite());
            bad.then(|| (source.path().to_path_buf(), key.to_owned()))
        });
        let error = Error::new(Code::NotFinite, format!("`{name}` holds NaN or infinite values"));
        match spoiled {
            Some((path, key)) => error.at(&path).key(key),
            None => error.at(self.adapter.source.path()),
        }
    }
}

/// Whether a module has a rank that can be changed; what has none stays as it is. An error says why not, and what helps.
fn resizable(module: &Module, resize: &Resize) -> Result<bool, (String, &'static str)> {
    let expand = "`lorafmt expand` makes plain LoRA of it, of any rank";
    match module.kind {
        Kind::Lora if module.get(Slot::Mid).is_some() => {
            Err(("has a Tucker core (`lora_mid`), which ties its ranks together".to_owned(), expand))
        }
        Kind::Lora => Ok(true),
        Kind::Norm | Kind::Set | Kind::Bias => Ok(false),
        // A difference of a vector has no rank.
        Kind::Full if module.tensors.values().all(|t: &Tensor| t.cols() == 1) => Ok(false),
        Kind::Full if resize.methods.iter().any(|m| matches!(m, Method::Rsvd { .. })) => Ok(true),
        Kind::Full => Err((
            "is a full difference, which has no factors".to_owned(),
            "`--method rsvd` finds some; so does `lorafmt expand`",
        )),
        kind => Err((format!("is {}, whose rank cannot be changed as it is", kind.name()), expand)),
    }
}
