use clap::Args;

const EXAMPLES: &str = "\
Examples:
  lorafmt completions bash > ~/.local/share/bash-completion/completions/lorafmt
  lorafmt completions zsh > ~/.zfunc/_lorafmt
  lorafmt completions fish > ~/.config/fish/completions/lorafmt.fish";

/// Print a completion script for a shell
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}
