use clap::Args;
use lorafmt_core::ops::resize::{Criterion, RankRule};

/// Which rank a module gets.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct RankArgs {
    /// The highest rank
    #[arg(long, value_name = "N")]
    pub(crate) rank: Option<usize>,
    /// The smallest rank that keeps this share of the energy
    ///
    /// The energy is the sum of the squared singular values of a module; 0.99 is an error of 10 %.
    #[arg(long, value_name = "E", group = "criterion", allow_negative_numbers = true)]
    pub(crate) energy: Option<f64>,
    /// The smallest rank whose relative error is at most E
    ///
    /// The error is the Frobenius norm of what is lost, relative to that of the module's weight difference.
    #[arg(long, value_name = "E", group = "criterion", allow_negative_numbers = true, hide_short_help = true)]
    pub(crate) max_error: Option<f64>,
}

impl RankArgs {
    /// The rule, if there is one. `--rank` is a limit beside another option.
    pub(crate) fn rule(&self) -> Option<RankRule> {
        let criterion = self.energy.map(Criterion::Energy).or(self.max_error.map(Criterion::MaxError));
        (self.rank.is_some() || criterion.is_some()).then_some(RankRule { limit: self.rank, criterion })
    }
}
