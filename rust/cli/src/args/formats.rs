use clap::Args;

const EXAMPLES: &str = "\
Examples:
  lorafmt formats
  lorafmt formats --json | jq '.dialects[].name'
  lorafmt formats --table my-dialect.toml";

/// List the model families and, for each dialect, whether it is read and written
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct FormatsArgs {}
