use clap::Args;

const EXAMPLES: &str = "\
Examples:
  lorafmt man > lorafmt.1
  lorafmt man convert | man -l -";

/// Print the manual page of lorafmt, or of one command, as roff
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ManArgs {
    /// The command
    pub(crate) command: Option<String>,
}
