//! Made-up adapters that are structurally real: every block module of a family, as a dialect names them, with seeded values.

use std::path::Path;

use rayon::prelude::*;

use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::io::{Bytes, Source, TensorInfo};
use crate::kind::Slot;
use crate::table::{AlphaPolicy, Component, Op, Place, Registry};

/// What sample to make.
#[derive(Debug, Clone)]
pub struct SampleOptions {
    /// The family.
    pub family: String,
    /// The dialect.
    pub dialect: String,
    /// Rank of every module.
    pub rank: usize,
    /// Alpha of every module; `None` for the rank. Only for dialects with alpha tensors.
    pub alpha: Option<f32>,
    /// Element type of the factors.
    pub dtype: Dtype,
    /// Same seed, same bytes.
    pub seed: u64,
    /// Modules outside the blocks too (embedders, final layer).
    pub top_level: bool,
    /// The text encoders too.
    pub text_encoders: bool,
}

/// Largest rank of a sample: it is made in memory, and a full FLUX.1 file takes 9.6 MB a rank.
const MAX_RANK: usize = 512;

/// Makes a sample in memory.
pub fn sample(registry: &Registry, options: &SampleOptions) -> Result<Source> {
    let family = registry.family(&options.family)?;
    let dialect = &registry.dialects[registry.dialect(&options.dialect)?];
    if !dialect.writes(family) {
        let message = format!("`{}` cannot be written for {}", dialect.name, registry.families[family].name);
        return Err(Error::new(Code::UnsupportedTarget, message));
    }
    if options.rank > MAX_RANK {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("a sample of rank {} is over the limit of {MAX_RANK}", options.rank),
        ));
    }
    if options.rank == 0 || !matches!(options.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32) {
        return Err(Error::new(Code::InvalidArgument, "a sample needs a rank of at least 1 and bf16, fp16 or fp32"));
    }
    if options.alpha.is_some() && dialect.alpha != AlphaPolicy::Tensor {
        return Err(Error::new(Code::InvalidArgument, format!("`{}` files hold no alpha", dialect.name)));
    }
    let mut infos: Vec<(TensorInfo, Option<f32>)> = Vec::new();
    for (c, component) in registry.families[family].components.iter().enumerate() {
        let Some(place) = dialect.place(family, c).filter(|p| !p.carried) else { continue };
        // By convention the first component is the model that every adapter is for.
        if c > 0 && !options.text_encoders {
            continue;
        }
        // A second part in the place of another one (an expert) would have its very keys.
        let taken = |other: usize| dialect.place(family, other).is_some_and(|p| p.prefix == place.prefix);
        if (0..c).any(taken) {
            continue;
        }
        for (path, rows, inputs) in modules(component, place, options.top_level) {
            let flat = place.prefix.ends_with('_');
            let base = format!("{}{}", place.prefix, if flat { path.replace('.', "_") } else { path });
            let mut push = |slot: Slot, shape: Vec<usize>, dtype: Dtype, value: Option<f32>| {
                if let Some(suffix) = dialect.suffix(slot, None) {
                    infos.push((TensorInfo { name: format!("{base}{suffix}"), dtype, shape, range: 0..0 }, value));
                }
            };
            let points = inputs[1..].iter().map(|_| 1);
            let up = [rows, options.rank].into_iter().chain(points).collect();
            push(Slot::Down, [options.rank].into_iter().chain(inputs).collect(), options.dtype, None);
            push(Slot::Up, up, options.dtype, None);
            if dialect.alpha == AlphaPolicy::Tensor {
                push(Slot::Alpha, vec![], Dtype::F32, Some(options.alpha.unwrap_or(options.rank as f32)));
            }
        }
    }
    if infos.is_empty() {
        return Err(Error::new(Code::NoModules, "the family has no layers in blocks").hint("add `--top-level`"));
    }
    let tensors: Vec<(TensorInfo, Bytes)> = infos
        .into_par_iter()
        .map(|(info, value)| {
            let bytes = match value {
                Some(value) => value.to_le_bytes().to_vec(),
                None => noise(&info, options.seed),
            };
            (info, Box::new(bytes) as Bytes)
        })
        .collect();
    let metadata = vec![("format".to_owned(), "pt".to_owned())];
    Source::from_tensors(Path::new("sample"), metadata, tensors)
}

/// Names of the layers in the dialect's namespace, with their outputs, and their inputs: of a convolution channels and kernel.
fn modules(component: &Component, place: &Place, top_level: bool) -> Vec<(String, usize, Vec<usize>)> {
    let mut out = Vec::new();
    for row in component.rows.iter().filter(|r| r.op != Op::Only && !r.inputs.is_empty()) {
        let area: usize = row.kernel.iter().product();
        let inputs: Vec<usize> = [row.inputs[0] / area].into_iter().chain(row.kernel.iter().copied()).collect();
        let templates = if place.namespace == 0 {
            row.canonical.iter().zip(&row.outputs).map(|(t, n)| (t, *n)).collect::<Vec<_>>()
        } else {
            row.names[place.namespace].iter().map(|t| (t, row.output())).collect()
        };
        for (template, output) in templates {
            for variables in component.instances(row) {
                if top_level || in_a_block(&row.canonical[0].render(&variables)) {
                    out.push((template.render(&variables), output, inputs.clone()));
                }
            }
        }
    }
    // A module fused differently in different namespaces stands in several rows.
    out.sort();
    out.dedup();
    out
}

/// Whether a module is inside a numbered block: a number in its path has something behind it.
fn in_a_block(path: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    path.rsplit('.').skip(1).any(number)
}

/// Values between -0.04 and 0.04, made of the seed, the key and the element's number (SplitMix64, Steele et al. 2014).
fn noise(info: &TensorInfo, seed: u64) -> Vec<u8> {
    let start =
        info.name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let count: usize = info.shape.iter().product();
    let mut out = Vec::with_capacity(count * info.dtype.size());
    for i in 0..count as u64 {
        let mut z = start.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let value = ((z >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * 0.04;
        match info.dtype {
            Dtype::BF16 => out.extend(crate::dtype::round_bf16(value).to_le_bytes()),
            Dtype::F16 => out.extend(half::f16::from_f32(value).to_le_bytes()),
            _ => out.extend(value.to_le_bytes()),
        }
    }
    out
}
