use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};

use super::{Inputs, RankArgs, Reading, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt resize style.safetensors --rank 16
  lorafmt resize style.safetensors --bytes 40MB -o small.safetensors
  lorafmt resize style.safetensors --rank 64 --method pad
  lorafmt resize -r loras --rank 16 --out-dir resized";

/// Give an adapter another rank, with the least error
///
/// Fewer ranks are chosen by the singular values of each weight difference, found through its factors: exact, and
/// without the model. More ranks change nothing of the effect. The output is `{stem}.r{rank}.safetensors` beside the
/// source unless `-o` or `--out-dir` says otherwise, and of the source's dialect unless `--to` does.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
    /// Every singular value above the largest divided by P
    #[arg(
        long,
        help_heading = "Ranks",
        value_name = "P",
        group = "criterion",
        hide_short_help = true,
        allow_negative_numbers = true
    )]
    pub(crate) sv_ratio: Option<f64>,
    /// A share P of the Frobenius norm
    #[arg(
        long,
        help_heading = "Ranks",
        value_name = "P",
        group = "criterion",
        hide_short_help = true,
        allow_negative_numbers = true
    )]
    pub(crate) sv_fro: Option<f64>,
    /// A share P of the sum of the singular values
    #[arg(
        long,
        help_heading = "Ranks",
        value_name = "P",
        group = "criterion",
        hide_short_help = true,
        allow_negative_numbers = true
    )]
    pub(crate) sv_cumulative: Option<f64>,
    /// N bytes, spent where they keep most
    ///
    /// The bytes of the factors of all modules together: 40000000, 40MB, 40MiB. Every module keeps at least one rank.
    #[arg(long, help_heading = "Ranks", value_name = "N", conflicts_with_all = ["criterion", "rank", "mean_rank"])]
    pub(crate) bytes: Option<Size>,
    /// A mean rank, spent where it keeps most
    #[arg(long, help_heading = "Ranks", value_name = "N", conflicts_with_all = ["criterion", "rank"],
        allow_negative_numbers = true)]
    pub(crate) mean_rank: Option<f64>,
    /// Rank N for modules that match (repeatable)
    ///
    /// A selector as for `--block` of `lorafmt compose`; of several that match the last one counts.
    #[arg(long, help_heading = "Ranks", value_name = "SELECTOR=N", hide_short_help = true)]
    pub(crate) rank_at: Vec<RankAt>,
    /// How: svd, rsvd, random, sparse-random, pad, orthogonal
    ///
    /// `svd` has the least error. `rsvd` is a randomised one, for full differences. `random` and `sparse-random` project, which
    /// loses much more. `pad` and `orthogonal` give more ranks: zeros, or orthonormal rows in one factor for training.
    #[arg(long, value_enum, default_value = "svd", value_name = "METHOD", hide_possible_values = true)]
    pub(crate) method: ResizeMethod,
    /// Of everything random
    #[arg(long, default_value_t = 0, value_name = "N", hide_short_help = true)]
    pub(crate) seed: u64,
    /// Power iterations of `rsvd`
    #[arg(long, default_value_t = 4, value_name = "N", hide_short_help = true)]
    pub(crate) niter: usize,
    /// Directions that `rsvd` follows beside the wanted ones
    #[arg(long, default_value_t = 10, value_name = "N", hide_short_help = true)]
    pub(crate) oversample: usize,
    /// Share of elements of `sparse-random` that are not zero
    #[arg(long, default_value_t = 0.1, value_name = "D", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) density: f64,
    /// Write to this file, or for peft a folder; `-` is stdout
    #[arg(short, long, value_name = "OUT", conflicts_with = "out_dir", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// Write into this folder, which is made if missing
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(crate) out_dir: Option<PathBuf>,
    /// The dialect to write, if not that of the source
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) writing: Writing,
}

/// How ranks are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResizeMethod {
    /// Singular values, through the factors
    Svd,
    /// Singular values, by random sampling
    Rsvd,
    /// A random projection
    Random,
    /// A random projection with few elements
    SparseRandom,
    /// More ranks, of zeros
    Pad,
    /// More ranks, orthonormal in one factor
    Orthogonal,
}

/// `SELECTOR=N`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RankAt {
    pub(crate) selector: String,
    pub(crate) rank: usize,
}

impl FromStr for RankAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (selector, rank) = text.rsplit_once('=').ok_or("it has no `=`; write SELECTOR=RANK")?;
        let rank = rank.trim().parse().map_err(|_| format!("`{rank}` is no rank; write SELECTOR=RANK"))?;
        Ok(Self { selector: selector.trim().to_owned(), rank })
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

const UNITS: [(&str, u64); 8] = [
    ("", 1),
    ("b", 1),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim().to_lowercase();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit =
            UNITS.iter().find(|(name, _)| *name == unit.trim()).ok_or("write bytes, or KB, MB, GB, KiB, MiB, GiB")?;
        let number: f64 = number.parse().map_err(|_| format!("`{number}` is no number of bytes"))?;
        Ok(Self((number * unit.1 as f64) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let size = |text: &str| text.parse::<Size>().map(|s| s.0);
        assert_eq!(size("1234"), Ok(1234));
        assert_eq!((size("1.5MB"), size("2 KiB"), size("1gib")), (Ok(1_500_000), Ok(2048), Ok(1 << 30)));
        assert!(size("").is_err() && size("x").is_err() && size("5 bananas").is_err() && size("-1").is_err());
    }
}
