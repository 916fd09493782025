use clap::{Args, ValueEnum};
use lorafmt_core::dtype::Dtype;

/// How an output is written, and whether.
#[derive(Debug, Clone, Args)]
pub(crate) struct Writing {
    /// The type of the factors: keep, bf16, fp16, fp32
    ///
    /// `keep`, the default, leaves each factor in the type that it has.
    #[arg(long, value_enum, value_name = "TYPE", hide_possible_values = true)]
    pub(crate) dtype: Option<DtypeArg>,
    /// Unknown keys: error, drop, keep
    ///
    /// `error` stops, `drop` leaves them out, `keep` carries them under their own names.
    #[arg(long, value_enum, default_value = "error", value_name = "HOW", hide_possible_values = true)]
    pub(crate) unknown: UnknownArg,
    /// What has no place: error, allow
    ///
    /// On what the target cannot hold, `error` stops and `allow` leaves it out and says so.
    #[arg(long, value_enum, default_value = "error", value_name = "HOW", hide_possible_values = true)]
    pub(crate) lossy: LossyArg,
    /// Write LoHa and LoKr as LoRA where that is exact and takes at most N ranks
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) max_rank: Option<usize>,
    /// Widen the inputs of modules that come in several widths to N, with zeros
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) widen: Option<usize>,
    /// Print the plan and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace existing outputs
    #[arg(long)]
    pub(crate) force: bool,
}

/// An element type of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// That of the input
    Keep,
    /// bfloat16
    #[value(alias = "bfloat16")]
    Bf16,
    /// float16
    #[value(alias = "f16", alias = "float16")]
    Fp16,
    /// float32
    #[value(alias = "f32", alias = "float32")]
    Fp32,
}

impl DtypeArg {
    /// `None` for that of the input.
    pub(crate) fn dtype(self) -> Option<Dtype> {
        match self {
            DtypeArg::Keep => None,
            DtypeArg::Bf16 => Some(Dtype::BF16),
            DtypeArg::Fp16 => Some(Dtype::F16),
            DtypeArg::Fp32 => Some(Dtype::F32),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum UnknownArg {
    /// Stop
    Error,
    /// Leave them out
    Drop,
    /// Carry them under their own names
    Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LossyArg {
    /// Stop
    Error,
    /// Leave it out and say so
    Allow,
}
