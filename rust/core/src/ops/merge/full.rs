//! Merging the deltas themselves: exact, tile by tile, and compressed to a low rank at the end.

use std::convert::Infallible;
use std::ops::Range;

use super::blend::{Blend, Part};
use super::options::MergeOptions;
use super::{Factored, Product, Trouble, dtype, held, refuse, shapes};
use crate::linalg::{Matrix, Sketch, Tall, sketch};
use crate::tensor::Tensor;

/// Up to this length of the smaller side the decomposition is the whole one.
const WHOLE: usize = 256;

/// `scale * up @ down`, some rows at a time.
#[derive(Debug, Clone)]
struct Delta {
    up: Tensor,
    /// In memory, since every row needs all of it: rank x inputs.
    down: Matrix,
    scale: f64,
}

impl Tall for Delta {
    fn rows(&self) -> usize {
        self.up.rows()
    }

    fn cols(&self) -> usize {
        self.down.cols()
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        let factors = vec![self.scale; self.up.cols()];
        Matrix::new(rows.len(), self.up.cols(), self.up.rows_f64(rows)).scaled_cols(&factors).times(&self.down)
    }
}

/// Merges terms of any ranks; the result has at most `rank` of them, the highest of the terms unless given.
///
/// Every pass of the range finder ([`sketch`]) makes the merged delta anew, so that no more than a tile of it is ever
/// held.
pub(super) fn merge(
    parts: &[Factored],
    options: &MergeOptions,
    name: &str,
    rank: Option<usize>,
) -> Result<Product, Trouble> {
    let deltas = parts.iter().map(|p| {
        let down = Matrix::new(p.down.rows(), p.down.cols(), p.down.to_f64());
        Part { matrix: Delta { up: p.up.clone(), down, scale: p.scale }, weight: p.weight, term: p.term }
    });
    let blend = Blend::new(deltas.collect(), options, name);
    let (m, n) = (blend.rows(), blend.cols());
    let rank = rank.or_else(|| parts.iter().map(|p| p.down.rows()).max()).unwrap_or(1).min(m).min(n);
    let mut how = Sketch { seed: options.seed, ..Sketch::of_rank(rank) };
    if m.min(n) <= WHOLE {
        how.oversample = m.min(n) - rank;
    }
    let tile = |rows| Ok::<_, Infallible>(blend.read(rows).into_data());
    let Ok(found) = sketch(m, n, how, tile);
    let Some(found) = found else { return refuse("has a merged delta that is too large for float64") };
    let norm = found.norm2.sqrt();
    let kept = found.svd.s[..rank].iter().take_while(|s| **s > 0.0).count();
    let lost = found.norm2 - found.svd.s[..kept].iter().map(|s| s * s).sum::<f64>();
    let shares: Vec<f64> = found.svd.s[..kept].iter().map(|s| s.sqrt()).collect();
    let dtype = dtype(parts.iter().flat_map(|p| [&p.up, &p.down]));
    let (up_shape, down_shape) = shapes(&parts[0], kept.max(1));
    let (up, down) = match kept {
        0 => (Tensor::zeros(dtype, up_shape), Tensor::zeros(dtype, down_shape)),
        k => {
            let up = found.svd.u.first_cols(k).scaled_cols(&shares);
            let down = found.svd.v.first_cols(k).scaled_cols(&shares).transposed();
            (held(&up, dtype, up_shape), held(&down, dtype, down_shape))
        }
    };
    let relative_error = if norm > 0.0 { lost.max(0.0).sqrt() / norm } else { 0.0 };
    Ok(Product { up, down, norm: Some(norm), relative_error: Some(relative_error) })
}
