use clap::Args;

use super::{Inputs, Reading};

const EXAMPLES: &str = "\
Examples:
  lorafmt detect *.safetensors
  lorafmt detect -r loras | cut -f 3 | sort | uniq -c
  curl -L URL | lorafmt detect -";

/// Print one line a file: dialect, family, share of the keys that are understood
///
/// On a pipe the columns are separated by tabs: path, dialect, family, coverage.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DetectArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    #[command(flatten)]
    pub(crate) reading: Reading,
}
