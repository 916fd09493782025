use std::path::PathBuf;

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  lorafmt quantize FLUX.1-dev/transformer -o svdq-int4.safetensors
  lorafmt quantize transformer.safetensors -o base.safetensors --rank 64
  lorafmt quantize transformer.safetensors -o b.safetensors --maxima m.safetensors";

/// Write a 16-bit FLUX.1 transformer as a checkpoint in Nunchaku's int4 layout
///
/// Each weight becomes a 16-bit branch of its largest singular directions and int4 numbers in groups of 64 for the rest,
/// rounded to the nearest. Without the maxima of activations nothing is smoothed, and with them as SmoothQuant does; the
/// calibrated checkpoints that Nunchaku publishes are nearer to the model. One layer is in memory at a time. It takes
/// Python with lorafmt and torch.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct QuantizeArgs {
    /// The transformer in diffusers' names: a file, or a folder with its shards and config.json
    #[arg(value_name = "MODEL", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) model: PathBuf,
    /// Write to this file
    #[arg(short, long, value_name = "OUT", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// The rank of the 16-bit branches, a multiple of 16
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) rank: usize,
    /// Smooth by these: the largest magnitude of each input of a layer, a vector under the layer's path
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) maxima: Option<PathBuf>,
    /// How much of the difficulty smoothing moves from activations to weights, from 0 to 1
    #[arg(long, value_name = "A", default_value_t = 0.5, requires = "maxima")]
    pub(crate) alpha: f64,
    /// Leave modulation layers in 16 bits
    #[arg(long)]
    pub(crate) no_modulation: bool,
    /// Say what would be written and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace an existing output
    #[arg(long)]
    pub(crate) force: bool,
}
