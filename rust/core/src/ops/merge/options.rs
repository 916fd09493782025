//! Which rule merges, and its numbers.

use crate::error::{Code, Error, Result};

macro_rules! names {
    ($(#[$doc:meta])* $type:ident { $($(#[$inner:meta])* $variant:ident $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $type { $($(#[$inner])* $variant,)* }

        impl $type {
            /// Every one.
            pub const ALL: &'static [$type] = &[$($type::$variant,)*];
            /// The name that options and reports use.
            pub fn name(self) -> &'static str { match self { $($type::$variant => $name,)* } }
            /// The one of that name; `_` counts as `-`.
            pub fn from_name(name: &str) -> Option<Self> {
                let name = name.replace('_', "-");
                Self::ALL.iter().copied().find(|x| x.name() == name)
            }
        }
    };
}

names! {
    /// How several deltas become one.
    Method {
        /// The factors are added one by one, as PEFT does: not the sum of the deltas.
        Linear "linear",
        /// Trim, elect a sign, average what agrees (Yadav et al. 2023).
        Ties "ties",
        /// Drop at random and rescale, then add (Yu et al. 2024).
        DareLinear "dare-linear",
        /// Drop at random and rescale, then elect a sign.
        DareTies "dare-ties",
        /// Trim, then add.
        MagnitudePrune "magnitude-prune",
        /// Drop at random, small ones rather, then elect a sign (Deep et al. 2024).
        Della "della",
        /// The same without an election.
        DellaLinear "della-linear",
        /// Leave out the smallest and the largest, then add (Davari and Belilovsky 2023).
        Breadcrumbs "breadcrumbs",
        /// The same, then elect a sign.
        BreadcrumbsTies "breadcrumbs-ties",
    }
}

names! {
    /// Whose conventions count: the order of weights and election, what is divided by, what is rescaled.
    Rule {
        /// Hugging Face PEFT, `add_weighted_adapter`.
        Peft "peft",
        /// Arcee's mergekit, generalised task arithmetic.
        Mergekit "mergekit",
    }
}

names! {
    /// What the elements are that a method looks at.
    Space {
        /// Those of the deltas in bases that all terms share: few, and nothing is lost.
        Core "core",
        /// Those of the deltas themselves; the result has full rank and is compressed again.
        Delta "delta",
        /// Those of the factors, up and down apart: the result depends on how a delta was factored.
        Factors "factors",
    }
}

names! {
    /// How a sign is elected.
    Sign {
        /// That of the sum.
        Total "total",
        /// That of most.
        Frequency "frequency",
    }
}

/// What a method keeps of a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sparse {
    /// All.
    Nothing,
    /// The largest.
    Magnitude,
    /// Some at random.
    Random,
    /// Some at random, more of the larger ones of a row.
    Ranked,
    /// The middle ones by size.
    Outliers,
}

/// How kept elements are enlarged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rescale {
    /// Not at all.
    No,
    /// Divided by the density: the expected value stays.
    Density,
    /// To the sum of absolute values that the term had.
    Norm,
}

/// What is known of a method: one row each.
struct Row {
    sparse: Sparse,
    elects: bool,
    /// Whether PEFT has it.
    peft: bool,
    /// Whether mergekit normalises by default, and whether it rescales; `None` where it has nothing like it.
    mergekit: Option<(bool, bool)>,
}

impl Method {
    /// mergekit's defaults are those of `merge_methods/registry.py`.
    fn row(self) -> Row {
        let row = |sparse, elects, peft, mergekit| Row { sparse, elects, peft, mergekit };
        match self {
            Method::Linear => row(Sparse::Nothing, false, true, None),
            Method::Ties => row(Sparse::Magnitude, true, true, Some((true, false))),
            Method::DareLinear => row(Sparse::Random, false, true, Some((false, true))),
            Method::DareTies => row(Sparse::Random, true, true, Some((false, true))),
            Method::MagnitudePrune => row(Sparse::Magnitude, false, true, Some((false, false))),
            Method::Della => row(Sparse::Ranked, true, false, Some((true, true))),
            Method::DellaLinear => row(Sparse::Ranked, false, false, Some((false, true))),
            Method::Breadcrumbs => row(Sparse::Outliers, false, false, Some((false, false))),
            Method::BreadcrumbsTies => row(Sparse::Outliers, true, false, Some((false, false))),
        }
    }

    /// Whether PEFT has it.
    pub fn is_peft(self) -> bool {
        self.row().peft
    }

    /// The rule that counts where none is named: PEFT's for methods that it has.
    fn home(self) -> Rule {
        if self.row().peft { Rule::Peft } else { Rule::Mergekit }
    }
}

/// How deltas are merged. What is `None` is as the rule has it.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeOptions {
    /// The method.
    pub method: Method,
    /// Whose conventions; `None` for PEFT's where it has the method, and mergekit's elsewhere.
    pub rule: Option<Rule>,
    /// Whose elements; `None` for the core, and the factors for `linear`.
    pub space: Option<Space>,
    /// The share of elements that is kept, 0 to 1. PEFT has no default, mergekit's is 1.
    pub density: Option<f64>,
    /// The densities of single terms of the composition, in place of the general one. May be shorter than the terms.
    pub densities: Vec<Option<f64>>,
    /// How signs are elected; `total` unless given.
    pub sign: Option<Sign>,
    /// Whether the sum is divided: by the number of terms that count (PEFT), or by their weights (mergekit).
    pub normalize: Option<bool>,
    /// Whether what is kept is enlarged.
    pub rescale: Option<bool>,
    /// DELLA: how far the chances to be kept differ from the density; 0.15 unless given.
    pub epsilon: Option<f64>,
    /// Breadcrumbs: the share of largest elements that is left out; 0.01 unless given.
    pub gamma: Option<f64>,
    /// A factor on the result, mergekit's `lambda`.
    pub lambda: f64,
    /// Of random choices.
    pub seed: u64,
}

impl MergeOptions {
    /// A method with the defaults of its rule.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            rule: None,
            space: None,
            density: None,
            densities: Vec::new(),
            sign: None,
            normalize: None,
            rescale: None,
            epsilon: None,
            gamma: None,
            lambda: 1.0,
            seed: 0,
        }
    }

    /// The rule that counts.
    pub fn rule(&self) -> Rule {
        self.rule.unwrap_or(self.method.home())
    }

    /// The space that counts.
    pub fn space(&self) -> Space {
        self.space.unwrap_or(if self.method == Method::Linear { Space::Factors } else { Space::Core })
    }

    /// An error if a number is out of its range, or if an option is given that the method does not have. `terms` is
    /// the number of terms of the composition.
    pub fn check(&self, terms: usize) -> Result<()> {
        let (row, name, rule) = (self.method.row(), self.method.name(), self.rule().name());
        if self.method == Method::Linear && self.space() != Space::Factors {
            return Err(wrong("`linear` adds factors, whatever the space", "`cat` is the exact sum of the deltas"));
        }
        let known = match self.rule() {
            Rule::Peft => row.peft,
            Rule::Mergekit => row.mergekit.is_some(),
        };
        if !known {
            let hint = format!("leave the rule out: that of {} counts", self.method.home().name());
            return Err(wrong(format!("{rule} has no method `{name}`"), hint));
        }
        let unused = [
            (
                "density",
                self.density.is_some() || self.densities.iter().any(Option::is_some),
                row.sparse != Sparse::Nothing,
            ),
            ("sign", self.sign.is_some(), row.elects),
            ("epsilon", self.epsilon.is_some(), row.sparse == Sparse::Ranked),
            ("gamma", self.gamma.is_some(), row.sparse == Sparse::Outliers),
            ("rescale", self.rescale.is_some(), row.sparse == Sparse::Random || self.rule() == Rule::Mergekit),
            ("normalize", self.normalize.is_some(), self.method != Method::Linear),
        ];
        if let Some((option, ..)) = unused.iter().find(|(_, given, has)| *given && !has) {
            return Err(wrong(format!("`{name}` of {rule} has no {option}"), "leave it out"));
        }
        if !self.lambda.is_finite() {
            return Err(wrong(format!("the factor is {}", self.lambda), "give a finite number"));
        }
        let of_none = self.density.or_else(|| self.default_density());
        for term in 0..terms {
            match self.densities.get(term).copied().flatten().or(of_none) {
                Some(density) => self.check_density(density)?,
                None => {
                    let hint = "give the share of elements to keep, such as 0.5; 1 keeps all";
                    return Err(wrong(format!("`{name}` of {rule} needs a density"), hint));
                }
            }
        }
        Ok(())
    }

    fn check_density(&self, density: f64) -> Result<()> {
        if !(0.0..=1.0).contains(&density) {
            return Err(wrong(format!("the density is {density}"), "a density is a share, from 0 to 1"));
        }
        let gamma = self.gamma();
        if !(0.0..1.0).contains(&gamma) {
            return Err(wrong(format!("gamma is {gamma}"), "gamma is a share, from 0 to less than 1"));
        }
        let epsilon = self.epsilon();
        // As in mergekit, a density of 0 or 1 leaves no choice and needs no room.
        let open = density > 0.0 && density < 1.0 && self.method.row().sparse == Sparse::Ranked;
        if !epsilon.is_finite() || epsilon < 0.0 || open && (density + epsilon >= 1.0 || density - epsilon <= 0.0) {
            let hint = "density - epsilon and density + epsilon have to lie between 0 and 1";
            return Err(wrong(format!("epsilon is {epsilon} where the density is {density}"), hint));
        }
        Ok(())
    }

    fn default_density(&self) -> Option<f64> {
        let idle = self.rule() == Rule::Mergekit || self.method.row().sparse == Sparse::Nothing;
        idle.then_some(1.0)
    }

    /// The density of a term of the composition.
    pub(super) fn density_of(&self, term: usize) -> f64 {
        let own = self.densities.get(term).copied().flatten();
        own.or(self.density).or_else(|| self.default_density()).unwrap_or(1.0)
    }

    pub(super) fn sparse(&self) -> Sparse {
        self.method.row().sparse
    }

    pub(super) fn election(&self) -> Option<Sign> {
        self.method.row().elects.then(|| self.sign.unwrap_or(Sign::Total))
    }

    pub(super) fn normalizes(&self) -> bool {
        let row = self.method.row();
        self.normalize.unwrap_or(match self.rule() {
            Rule::Peft => row.elects,
            Rule::Mergekit => row.mergekit.is_some_and(|(normalizes, _)| normalizes),
        })
    }

    pub(super) fn rescaling(&self) -> Rescale {
        let row = self.method.row();
        let (default, how) = match self.rule() {
            Rule::Peft => (row.sparse == Sparse::Random, Rescale::Density),
            Rule::Mergekit => (row.mergekit.is_some_and(|(_, rescales)| rescales), Rescale::Norm),
        };
        if self.rescale.unwrap_or(default) { how } else { Rescale::No }
    }

    pub(super) fn epsilon(&self) -> f64 {
        self.epsilon.unwrap_or(0.15)
    }

    pub(super) fn gamma(&self) -> f64 {
        self.gamma.unwrap_or(0.01)
    }
}

fn wrong(message: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, message).hint(hint)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn with(method: Method, change: impl Fn(&mut MergeOptions)) -> MergeOptions {
        let mut options = MergeOptions { density: Some(0.5), ..MergeOptions::new(method) };
        change(&mut options);
        options
    }

    #[test]
    fn names_read_back() {
        for method in Method::ALL {
            assert_eq!(Method::from_name(method.name()), Some(*method));
        }
        assert_eq!(Method::from_name("dare_ties"), Some(Method::DareTies));
        assert_eq!(Method::from_name("slerp"), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        type Change = fn(&mut MergeOptions);
        let wrong: [(Method, Change, &str); 12] = [
            (Method::Ties, |o| o.density = Some(1.5), "density"),
            (Method::Ties, |o| o.density = Some(f64::NAN), "density"),
            (Method::Ties, |o| o.density = None, "needs a density"),
            (Method::Ties, |o| o.densities = vec![None, Some(-0.1)], "density"),
            (Method::Ties, |o| o.gamma = Some(0.1), "no gamma"),
            (Method::DareLinear, |o| o.sign = Some(Sign::Total), "no sign"),
            (Method::Della, |o| o.rule = Some(Rule::Peft), "no method"),
            (Method::Della, |o| o.epsilon = Some(0.5), "epsilon"),
            (Method::Breadcrumbs, |o| o.gamma = Some(1.0), "gamma"),
            (Method::Linear, |_| (), "no density"),
            (Method::Linear, |o| o.space = Some(Space::Core), "factors"),
            (Method::Ties, |o| o.rescale = Some(true), "no rescale"),
        ];
        for (method, change, words) in wrong {
            let error = with(method, change).check(2).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
            assert!(error.message().contains(words), "{}: {}", method.name(), error.message());
        }
        let right: [(Method, Change); 5] = [
            (Method::Ties, |_| ()),
            (Method::Ties, |o| (o.density, o.densities) = (None, vec![Some(0.0), Some(1.0)])),
            (Method::Ties, |o| (o.rule, o.density) = (Some(Rule::Mergekit), None)),
            (Method::Della, |o| o.epsilon = Some(0.49)),
            (Method::Linear, |o| o.density = None),
        ];
        for (method, change) in right {
            with(method, change).check(2).unwrap();
        }
    }
}
