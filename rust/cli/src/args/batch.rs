use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{NativeArgs, RankArgs, Reading, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt batch loras --to diffusers --out-dir converted
  lorafmt batch 'loras/**/*.safetensors' --to nunchaku --base svdq.safetensors --out-dir native
  lorafmt batch s3://bucket/loras/ --to comfyui --out-dir s3://bucket/comfyui --manifest comfyui.jsonl
  lorafmt batch --files-from list.txt --op resize --rank 16 --out-dir small
  lorafmt batch recipes --op compose --out-dir composed";

/// Convert whole libraries: folders, patterns, lists, repositories, buckets
///
/// Each source has one output below `--out-dir`, in the folders that it was found in. What became of each file is a line
/// of the manifest; the same command run again does what is missing or has changed, and nothing else. A file that fails
/// does not stop the others. Outputs that the manifest does not know are never replaced without `--force`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BatchArgs {
    /// Adapter files, folders, patterns, `hf://` and `s3://` addresses
    #[arg(required_unless_present_any = ["files_from", "plan"], value_name = "SRC", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) sources: Vec<String>,
    /// Take further sources from a file, one a line; `-` is standard input
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) files_from: Vec<PathBuf>,
    /// Take sources with their outputs from what `--dry-run --json` printed
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, hide_short_help = true)]
    pub(crate) plan: Vec<PathBuf>,
    /// Write into this folder, which is made if missing, or below an `s3://` address
    #[arg(long, value_name = "DST", value_hint = clap::ValueHint::DirPath)]
    pub(crate) out_dir: String,
    /// What to do with each file: convert, resize, normalize, compose
    ///
    /// `convert` needs `--to`. `resize` needs a rank, `normalize` a rank and `--like`. For `compose` the sources are recipes.
    #[arg(long, value_enum, default_value = "convert", value_name = "STEP", hide_possible_values = true)]
    pub(crate) op: OpArg,
    /// The dialect to write (`lorafmt formats` lists them); that of the source for resize
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    /// How outputs are called [default: {dir}/{stem}.{ending}.safetensors]
    ///
    /// `{dir}` is the folder that the source was found in, `{stem}` its name, `{ending}` the dialect or the rank.
    #[arg(long, value_name = "TEMPLATE")]
    pub(crate) name: Option<String>,
    /// Multiply the effect of the adapters
    #[arg(long, default_value_t = 1.0, value_name = "S", allow_negative_numbers = true)]
    pub(crate) strength: f64,
    /// For normalize: bring all files to the modules of this adapter
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) like: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) writing: Writing,
    #[command(flatten)]
    pub(crate) native: NativeArgs,
}

/// How a run goes about it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Run")]
pub(crate) struct RunArgs {
    /// The file of records [default: DST/manifest.jsonl]
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) manifest: Option<PathBuf>,
    /// Also write all records as a Parquet table
    ///
    /// Takes Python with lorafmt and pyarrow (`pip install "lorafmt[parquet]"`).
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, hide_short_help = true)]
    pub(crate) parquet: Option<PathBuf>,
    /// Tell by hashes whether something has changed, not by size and time
    #[arg(long)]
    pub(crate) verify_hash: bool,
    /// Record the XXH3 of every source and output in the manifest
    #[arg(long)]
    pub(crate) hash: bool,
    /// Stop after N failures
    #[arg(long, value_name = "N")]
    pub(crate) max_failures: Option<u64>,
    /// Files with the same content: link, copy, convert
    ///
    /// `link` converts one and gives its output further names, `copy` copies it, `convert` converts each.
    #[arg(long, value_enum, default_value = "link", value_name = "HOW", hide_possible_values = true)]
    pub(crate) duplicates: DuplicatesArg,
    /// Work on N files at a time [default: one a core; four for sources elsewhere]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) workers: Option<std::num::NonZeroUsize>,
    /// Where the work is done: local, ray, ray:ADDRESS
    ///
    /// `ray` takes Python with lorafmt and Ray (`pip install "lorafmt[ray]"`) on this machine and on those of the cluster.
    #[arg(long, default_value = "local", value_name = "ENGINE")]
    pub(crate) engine: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OpArg {
    /// Write another dialect
    Convert,
    /// Change ranks
    Resize,
    /// One set of modules and one rank for all
    Normalize,
    /// Compose what each recipe names
    Compose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DuplicatesArg {
    /// Convert one, link the others
    Link,
    /// Convert one, copy the others
    Copy,
    /// Convert each
    Convert,
}
