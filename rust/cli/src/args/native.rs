use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lorafmt_core::native::{Layout, Precision};

/// Options of adapters to quantized models.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Quantized models")]
pub(crate) struct NativeArgs {
    /// The quantized checkpoint that a native adapter is for
    ///
    /// A path, or an address (hf://, s3://), which is fetched.
    #[arg(long, value_name = "BASE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) base: Option<PathBuf>,
    /// Where each adapter's ranks start in a native file [default: aligned]
    #[arg(long, value_enum, value_name = "LAYOUT", hide_short_help = true)]
    pub(crate) layout: Option<LayoutArg>,
    /// Refuse a base that is quantized to something else
    #[arg(long, value_enum, value_name = "PRECISION", hide_short_help = true)]
    pub(crate) precision: Option<PrecisionArg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// On multiples of 16, so that each adapter has rank scales of its own
    Aligned,
    /// Without gaps, as Nunchaku's own tools do
    Packed,
}

impl LayoutArg {
    pub(crate) fn layout(self) -> Layout {
        match self {
            LayoutArg::Aligned => Layout::Aligned,
            LayoutArg::Packed => Layout::Packed,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrecisionArg {
    /// 4-bit integers
    Int4,
    /// NVIDIA's 4-bit floating point
    #[value(alias = "nvfp4")]
    Fp4,
}

impl PrecisionArg {
    pub(crate) fn precision(self) -> Precision {
        match self {
            PrecisionArg::Int4 => Precision::Int4,
            PrecisionArg::Fp4 => Precision::Fp4,
        }
    }
}
