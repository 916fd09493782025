//! What somebody chose about merging: on a command line, in a recipe, by keyword arguments.

use super::options::{MergeOptions, Method, Rule, Sign, Space};
use crate::error::{Code, Error, Result};

/// What becomes of several adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    /// Their ranks stand side by side: the sum of their deltas.
    #[default]
    Cat,
    /// The same, and then fewer ranks.
    Svd,
    /// A rule merges them.
    Merge(Method),
}

impl Way {
    /// Every one.
    pub fn all() -> impl Iterator<Item = Way> {
        [Way::Cat, Way::Svd].into_iter().chain(Method::ALL.iter().copied().map(Way::Merge))
    }

    /// The name that options use.
    pub fn name(self) -> &'static str {
        match self {
            Way::Cat => "cat",
            Way::Svd => "svd",
            Way::Merge(method) => method.name(),
        }
    }

    /// The one of that name; `_` counts as `-`.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.replace('_', "-");
        Self::all().find(|way| way.name() == name)
    }
}

/// Choices about merging; `None` is left to the rule.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Choices {
    pub way: Option<Way>,
    pub rule: Option<Rule>,
    pub space: Option<Space>,
    pub density: Option<f64>,
    pub sign: Option<Sign>,
    pub normalize: Option<bool>,
    pub rescale: Option<bool>,
    pub epsilon: Option<f64>,
    pub gamma: Option<f64>,
    pub lambda: Option<f64>,
    pub seed: Option<u64>,
}

impl Choices {
    /// What PEFT's `combination_type` says: `cat`, `svd`, or a method on the factors, or with `_svd` on the deltas.
    /// `None` if PEFT has no such name.
    pub fn from_peft(name: &str) -> Option<Self> {
        let of = |way| Choices { way: Some(way), ..Choices::default() };
        if let Some(way) = [Way::Cat, Way::Svd].into_iter().find(|way| way.name() == name) {
            return Some(of(way));
        }
        let (method, space) = match name.strip_suffix("_svd") {
            Some(method) => (method, Space::Delta),
            None => (name, Space::Factors),
        };
        let method = Method::from_name(method).filter(|m| m.is_peft())?;
        let known = method != Method::Linear || space == Space::Factors;
        known.then(|| Choices { rule: Some(Rule::Peft), space: Some(space), ..of(Way::Merge(method)) })
    }

    /// These choices, and the others where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            way: self.way.or(other.way),
            rule: self.rule.or(other.rule),
            space: self.space.or(other.space),
            density: self.density.or(other.density),
            sign: self.sign.or(other.sign),
            normalize: self.normalize.or(other.normalize),
            rescale: self.rescale.or(other.rescale),
            epsilon: self.epsilon.or(other.epsilon),
            gamma: self.gamma.or(other.gamma),
            lambda: self.lambda.or(other.lambda),
            seed: self.seed.or(other.seed),
        }
    }

    /// The options of the rule, with a density for each term that has one of its own; `None` where no rule merges. An
    /// error for numbers that make no sense, and for choices that nothing takes notice of. A seed may stand beside any
    /// method.
    pub fn options(&self, densities: Vec<Option<f64>>) -> Result<Option<MergeOptions>> {
        let way = self.way.unwrap_or_default();
        let Way::Merge(method) = way else {
            let given = [
                ("rule", self.rule.is_some()),
                ("space", self.space.is_some()),
                ("density", self.density.is_some() || densities.iter().any(Option::is_some)),
                ("sign", self.sign.is_some()),
                ("normalize", self.normalize.is_some()),
                ("rescale", self.rescale.is_some()),
                ("epsilon", self.epsilon.is_some()),
                ("gamma", self.gamma.is_some()),
                ("lambda", self.lambda.is_some()),
            ];
            return match given.iter().find(|(_, given)| *given) {
                None => Ok(None),
                Some((option, _)) => {
                    let message = format!("`{}` has no {option}", way.name());
                    let methods: Vec<&str> = Method::ALL.iter().map(|m| m.name()).collect();
                    let hint = format!("choose a method that merges: {}", methods.join(", "));
                    Err(Error::new(Code::InvalidArgument, message).hint(hint))
                }
            };
        };
        let options = MergeOptions {
            rule: self.rule,
            space: self.space,
            density: self.density,
            densities,
            sign: self.sign,
            normalize: self.normalize,
            rescale: self.rescale,
            epsilon: self.epsilon,
            gamma: self.gamma,
            lambda: self.lambda.unwrap_or(1.0),
            seed: self.seed.unwrap_or(0),
            ..MergeOptions::new(method)
        };
        options.check(options.densities.len().max(1))?;
        Ok(Some(options))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn peft_names_are_translated() {
        let of = |name| Choices::from_peft(name).map(|c| (c.way.unwrap(), c.space));
        assert_eq!(of("ties_svd"), Some((Way::Merge(Method::Ties), Some(Space::Delta))));
        assert_eq!(of("dare_linear"), Some((Way::Merge(Method::DareLinear), Some(Space::Factors))));
        assert_eq!(of("linear"), Some((Way::Merge(Method::Linear), Some(Space::Factors))));
        assert_eq!((of("cat"), of("svd")), (Some((Way::Cat, None)), Some((Way::Svd, None))));
        assert_eq!((of("linear_svd"), of("della"), of("cat_svd"), of("")), (None, None, None, None));
    }

    #[test]
    fn choices_that_nobody_hears_are_refused() {
        let choices = Choices { density: Some(0.5), ..Choices::default() };
        assert_eq!(choices.options(vec![]).unwrap_err().message(), "`cat` has no density");
        let svd = Choices { way: Some(Way::Svd), ..Choices::default() };
        assert!(svd.options(vec![Some(0.5)]).is_err());
        assert_eq!(svd.options(vec![None, None]).unwrap(), None);
        let ties = Choices { way: Way::from_name("ties"), ..choices.clone() };
        assert_eq!(ties.options(vec![]).unwrap().unwrap().density, Some(0.5));
        let own = Choices { way: Way::from_name("dare_ties"), ..Choices::default() };
        assert!(own.options(vec![Some(0.1), None]).is_err());
        assert!(own.options(vec![Some(0.1), Some(1.0)]).is_ok());
        assert_eq!(own.clone().or(choices).density, Some(0.5));
    }
}
