use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lorafmt_core::dtype::Dtype;

const EXAMPLES: &str = "\
Examples:
  lorafmt sample --family flux1 --dialect kohya --rank 4 -o s.safetensors
  lorafmt sample --family flux1 --dialect xlabs --rank 16 --seed 7 -o s.safetensors
  lorafmt sample --family chroma --dialect bfl --rank 2 -o - | lorafmt inspect -";

/// Make a structurally real adapter of seeded noise, to try things on
///
/// Holds every block module of the family under the names of the dialect. The same options give the same bytes.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SampleArgs {
    /// The model family, or one size of it (`lorafmt formats` lists both)
    #[arg(long)]
    pub(crate) family: String,
    /// The dialect
    #[arg(long)]
    pub(crate) dialect: String,
    /// The rank of every module
    #[arg(long, value_name = "N")]
    pub(crate) rank: usize,
    /// Write to this file; `-` is standard output
    #[arg(short, long, value_name = "OUT", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// The alpha of every module; the rank unless given
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    pub(crate) alpha: Option<f32>,
    /// The element type of the factors
    #[arg(long, value_enum, default_value = "bf16", value_name = "TYPE")]
    pub(crate) dtype: FloatArg,
    /// The seed of the values
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,
    /// Also the modules outside the blocks
    #[arg(long)]
    pub(crate) top_level: bool,
    /// Also the text encoders
    #[arg(long)]
    pub(crate) text_encoders: bool,
    /// Say what would be written and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace an existing output
    #[arg(long)]
    pub(crate) force: bool,
}

/// An element type that factors can be made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FloatArg {
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

impl FloatArg {
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            FloatArg::Bf16 => Dtype::BF16,
            FloatArg::Fp16 => Dtype::F16,
            FloatArg::Fp32 => Dtype::F32,
        }
    }
}
