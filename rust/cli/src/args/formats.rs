use clap::Args;

const EXAMPLES: &str = "\
Examples:
  lorafmt formats
  lorafmt formats --json | jq '.dialects[].name'
  lorafmt formats --table my-dialect.toml";

/// List the dialects and, for each model family, whether they are read and written
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct FormatsArgs {}
