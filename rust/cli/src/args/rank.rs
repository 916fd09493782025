use clap::Args;
use lorafmt_core::ops::resize::{Criterion, RankRule};

/// Which rank a module gets.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RankArgs {
    /// The highest rank
    #[arg(long, help_heading = "Ranks", value_name = "N")]
    pub(crate) rank: Option<usize>,
    /// What keeps this share of the energy
    ///
    /// The smallest such rank. The energy is the sum of the squared singular values of a module; 0.99 is an error of 10 %.
    #[arg(long, help_heading = "Ranks", value_name = "E", group = "criterion", allow_negative_numbers = true)]
    pub(crate) energy: Option<f64>,
    /// What has at most this relative error
    ///
    /// The smallest such rank. The error is the Frobenius norm of what is lost, relative to that of the module's weight difference.
    #[arg(long, help_heading = "Ranks", value_name = "E", group = "criterion", allow_negative_numbers = true)]
    pub(crate) max_error: Option<f64>,
}

impl RankArgs {
    /// The rule, if there is one. `--rank` is a limit beside another option.
    pub(crate) fn rule(&self) -> Option<RankRule> {
        let criterion = self.energy.map(Criterion::Energy).or(self.max_error.map(Criterion::MaxError));
        (self.rank.is_some() || criterion.is_some()).then_some(RankRule { limit: self.rank, criterion })
    }
}
