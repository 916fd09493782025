use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use lorafmt_core::ops::merge::{Choices, Rule, Sign, Space, Way};

use super::RankArgs;

/// How several adapters become one.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Merging")]
pub(crate) struct MergeArgs {
    /// How: cat, svd, ties, dare-ties, and others
    ///
    /// `cat`, the default, puts ranks side by side: the exact sum. `svd` then reduces them to `--rank`, `--energy` or `--max-error`.
    /// The others look at elements: `ties` keeps the largest, elects a sign and averages what agrees; `dare-linear`
    /// and `dare-ties` keep some at random; `magnitude-prune` keeps the largest and adds; `della` and `della-linear` keep at random,
    /// rather the larger ones; `breadcrumbs` and `breadcrumbs-ties` leave out the smallest and the largest. `linear` adds factors as PEFT does, which is not the sum.
    #[arg(long, value_name = "METHOD", value_parser = words(Way::all().map(Way::name), Way::from_name),
        hide_possible_values = true)]
    pub(crate) method: Option<Way>,
    /// The share of elements that is kept, 0 to 1
    #[arg(long, value_name = "D", allow_negative_numbers = true)]
    pub(crate) density: Option<f64>,
    /// Whose conventions: peft, mergekit
    ///
    /// `peft` elects signs before weights are multiplied and divides by the number of terms that agree; `mergekit` elects after, and
    /// divides by their weights. Unless given: that of PEFT, and of mergekit for methods that PEFT does not have.
    #[arg(long, value_name = "RULE", value_parser = words(Rule::ALL.iter().map(|x| x.name()), Rule::from_name),
        hide_possible_values = true, hide_short_help = true)]
    pub(crate) rule: Option<Rule>,
    /// Whose elements: core, delta, factors
    ///
    /// `core`, the default: those of the weight differences in bases that all adapters share. Nothing is lost. `delta`: those of the
    /// weight differences themselves, which are compressed to `--rank` again (the highest of the adapters); the loss is reported. `factors`: those of the factors, as PEFT without `_svd`; the result depends on the factorisation.
    #[arg(long, value_name = "SPACE", value_parser = words(Space::ALL.iter().map(|x| x.name()), Space::from_name),
        hide_possible_values = true, hide_short_help = true)]
    pub(crate) space: Option<Space>,
    /// How signs are elected: total, frequency
    ///
    /// By the sum, or by how many adapters have each sign.
    #[arg(long, value_name = "HOW", value_parser = words(Sign::ALL.iter().map(|x| x.name()), Sign::from_name),
        hide_possible_values = true, hide_short_help = true)]
    pub(crate) sign: Option<Sign>,
    /// Whether sums are divided by what was added: true, false
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_possible_values = true, hide_short_help = true)]
    pub(crate) normalize: Option<bool>,
    /// Whether kept elements make up for dropped ones: true, false
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_possible_values = true, hide_short_help = true)]
    pub(crate) rescale: Option<bool>,
    /// How far the chances of `della` differ from the density
    #[arg(long, value_name = "E", allow_negative_numbers = true, hide_short_help = true)]
    pub(crate) epsilon: Option<f64>,
    /// The share of largest elements that `breadcrumbs` leaves out
    #[arg(long, value_name = "G", allow_negative_numbers = true, hide_short_help = true)]
    pub(crate) gamma: Option<f64>,
    /// A factor on what a rule gives
    #[arg(long, value_name = "L", allow_negative_numbers = true, hide_short_help = true)]
    pub(crate) lambda: Option<f64>,
    /// Of random choices
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) seed: Option<u64>,
}

/// Words that the engine reads.
fn words<T: Clone + Send + Sync + 'static>(
    names: impl Iterator<Item = &'static str>,
    read: fn(&str) -> Option<T>,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(names).try_map(move |name| read(&name).ok_or("no such word"))
}

impl MergeArgs {
    /// What was chosen, with the ranks.
    pub(crate) fn choices(&self, ranks: &RankArgs) -> Choices {
        Choices {
            way: self.method,
            rule: self.rule,
            space: self.space,
            density: self.density,
            sign: self.sign,
            normalize: self.normalize,
            rescale: self.rescale,
            epsilon: self.epsilon,
            gamma: self.gamma,
            lambda: self.lambda,
            seed: self.seed,
            rank: ranks.rule(),
        }
    }
}
