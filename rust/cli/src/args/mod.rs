//! The command line, described. One file for each command; nothing here does any work.

mod batch;
mod check;
mod completions;
mod compose;
mod convert;
mod detect;
mod diff;
mod expand;
mod extract;
mod formats;
mod fuse;
mod inspect;
mod man;
mod merge;
mod native;
mod normalize;
mod quantize;
mod rank;
mod report;
mod resize;
mod sample;
mod scale;
mod strength;
mod unfuse;
mod writing;

use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, ColorChoice, CommandFactory, FromArgMatches, Parser, Subcommand};

pub(crate) use batch::{BatchArgs, DuplicatesArg, OpArg};
pub(crate) use check::CheckArgs;
pub(crate) use completions::CompletionsArgs;
pub(crate) use compose::ComposeArgs;
pub(crate) use convert::ConvertArgs;
pub(crate) use detect::DetectArgs;
pub(crate) use diff::{ByArg, DiffArgs};
pub(crate) use expand::ExpandArgs;
pub(crate) use extract::ExtractArgs;
pub(crate) use formats::FormatsArgs;
pub(crate) use fuse::FuseArgs;
pub(crate) use inspect::InspectArgs;
pub(crate) use man::ManArgs;
pub(crate) use merge::MergeArgs;
pub(crate) use native::{LayoutArg, NativeArgs, PrecisionArg};
pub(crate) use normalize::NormalizeArgs;
pub(crate) use quantize::QuantizeArgs;
pub(crate) use rank::RankArgs;
pub(crate) use report::ReportArgs;
pub(crate) use resize::{ResizeArgs, ResizeMethod};
pub(crate) use sample::SampleArgs;
pub(crate) use scale::ScaleArgs;
pub(crate) use strength::{Assignment, Places};
pub(crate) use unfuse::UnfuseArgs;
pub(crate) use writing::{DtypeArg, LossyArg, UnknownArg, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt inspect style.safetensors
  lorafmt convert style.safetensors --to diffusers
  lorafmt convert -r loras --to comfyui --out-dir converted
  lorafmt compose style.safetensors:0.8 face.safetensors:0.5 -o both.safetensors
  lorafmt inspect hf://user/repo/style.safetensors
  lorafmt check *.safetensors --json";

const MORE: &str = "\
Examples:
  lorafmt inspect style.safetensors
  lorafmt convert style.safetensors --to diffusers
  lorafmt convert -r loras --to comfyui --out-dir converted
  lorafmt compose style.safetensors:0.8 face.safetensors:0.5 -o both.safetensors
  lorafmt inspect hf://user/repo/style.safetensors
  lorafmt check *.safetensors --json

Remote files:
  hf://user/repo@revision/file.safetensors   a file of the Hugging Face hub
  user/repo/file.safetensors                 the same, where no such path exists
  s3://bucket/key.safetensors                an object in S3 or another store of its kind
  Tokens, endpoints and the cache are those of the HF_* and AWS_* variables.

Exit status:
  0    done
  1    the answer is no: a check failed, files differ, `--strict` met a warning
  2    wrong usage, or an input that cannot be read or is not supported
  3    some of many files failed
  130  interrupted

Further commands:
  lorafmt completions SHELL   a completion script for bash, zsh, fish, elvish or powershell
  lorafmt man [COMMAND]       the manual page";

/// Turns LoRA adapter files of any dialect into any other, exactly and fast.
#[derive(Debug, Parser)]
#[command(
    name = "lorafmt",
    bin_name = "lorafmt",
    version,
    after_help = EXAMPLES,
    after_long_help = MORE,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) global: Global,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Inspect(InspectArgs),
    Detect(DetectArgs),
    Check(CheckArgs),
    Convert(ConvertArgs),
    Batch(BatchArgs),
    Compose(ComposeArgs),
    Resize(ResizeArgs),
    Normalize(NormalizeArgs),
    Scale(ScaleArgs),
    Expand(ExpandArgs),
    Fuse(FuseArgs),
    Unfuse(UnfuseArgs),
    Extract(ExtractArgs),
    Diff(DiffArgs),
    Report(ReportArgs),
    Quantize(QuantizeArgs),
    Sample(SampleArgs),
    Formats(FormatsArgs),
    #[command(hide = true)]
    Completions(CompletionsArgs),
    #[command(hide = true)]
    Man(ManArgs),
}

/// When to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ColorArg {
    /// On terminals, unless NO_COLOR is set
    Auto,
    /// Also into files and pipes
    Always,
    /// Never
    Never,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print no summaries and no warnings
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "verbose")]
    pub(crate) quiet: u8,
    /// Print everything that is otherwise cut short
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Exit with 1 if there was a warning
    #[arg(long, global = true)]
    pub(crate) strict: bool,
    /// Add a dialect or a family from a TOML file (repeatable)
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) table: Vec<PathBuf>,
    /// Use at most N threads
    #[arg(long, global = true, value_name = "N", env = "LORAFMT_NUM_THREADS", hide_env_values = true)]
    pub(crate) jobs: Option<NonZeroUsize>,
    /// Show no progress bars
    #[arg(long, global = true, env = "LORAFMT_NO_PROGRESS", hide_env_values = true, hide_short_help = true,
        value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) no_progress: bool,
    /// When to colour the output
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value = "auto", hide_possible_values = true)]
    pub(crate) color: ColorArg,
}

/// The files that a command reads.
#[derive(Debug, Clone, Args)]
pub(crate) struct Inputs {
    /// Adapter files, PEFT folders, or addresses (hf://, s3://); `-` reads standard input
    ///
    /// `hf://user/repo@revision/file`, or `user/repo/file.safetensors` where no such path exists, is a file of a hub, and
    /// `s3://bucket/key` an object in a bucket.
    #[arg(required = true, value_name = "SRC", value_hint = clap::ValueHint::FilePath)]
    pub(crate) sources: Vec<PathBuf>,
    /// Take every .safetensors file inside folders, repositories and prefixes
    #[arg(short, long)]
    pub(crate) recursive: bool,
}

/// What the caller knows of the files already.
#[derive(Debug, Clone, Args)]
pub(crate) struct Reading {
    /// Read the file as this dialect instead of recognising it
    #[arg(long, value_name = "DIALECT")]
    pub(crate) from: Option<String>,
    /// Read the file as this model family, or one size of it (`lorafmt formats` lists both)
    #[arg(long, value_name = "FAMILY")]
    pub(crate) family: Option<String>,
}

/// The command line as clap describes it.
pub(crate) fn command() -> clap::Command {
    Cli::command()
}

/// Reads the command line. Help and version are errors here, too: clap says which.
pub(crate) fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    let color = if crate::output::no_color() { ColorChoice::Never } else { color_wanted(args) };
    let mut command = command().color(color);
    let args = args.iter().map(|arg| stdin_with_strength(arg));
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut command))
}

/// What stands for `-` where a strength follows.
const STDIN: &str = "<stdin>";

/// `-:0.5` is standard input at a strength; clap would take it for flags.
fn stdin_with_strength(arg: &OsStr) -> OsString {
    match arg.to_str().and_then(|text| text.strip_prefix("-:")) {
        Some(strength) => format!("{STDIN}:{strength}").into(),
        None => arg.to_owned(),
    }
}

/// A source as it was typed.
pub(crate) fn typed(source: &OsStr) -> OsString {
    match source.to_str().and_then(|text| text.strip_prefix(STDIN)) {
        Some(strength) if strength.starts_with(':') => format!("-{strength}").into(),
        _ => source.to_owned(),
    }
}

/// What `--color` says, for the help text, which is printed before arguments are understood.
fn color_wanted(args: &[OsString]) -> ColorChoice {
    let value = |text: &OsStr| match text.to_str() {
        Some("always") => ColorChoice::Always,
        Some("never") => ColorChoice::Never,
        _ => ColorChoice::Auto,
    };
    let joined = args.iter().find_map(|a| a.to_str()?.strip_prefix("--color="));
    let apart = args.windows(2).find(|pair| pair[0] == "--color").map(|pair| pair[1].as_os_str());
    joined.map(OsStr::new).or(apart).map_or(ColorChoice::Auto, value)
}

/// Whether errors are to be JSON, known before arguments are understood.
pub(crate) fn wants_json(args: &[OsString]) -> bool {
    args.iter().skip(1).take_while(|a| *a != "--").any(|a| a == "--json")
}
