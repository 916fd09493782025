//! Orthogonal fine-tuning: the weight times a rotation.
//!
//! A block is stored as any square matrix; its skew part Q = B - B^T makes the rotation R = (I + Q)(I - Q)^-1 (Cayley),
//! after Q was brought to the norm that the constraint allows. Diagonal OFT multiplies each block of rows by R^T (LyCORIS
//! `functional/diag_oft.py`, sd-scripts `networks/oft_flux.py`: both sum over the first index of R), BOFT multiplies by
//! R, stage after stage over rows that are further and further apart (LyCORIS `functional/boft.py`).

use std::ops::Range;

use crate::kind::{Module, Refusal, Slot};
use crate::linalg::Matrix;
use crate::tensor::Tensor;

/// Columns that pass through all stages of a butterfly at a time.
const COLUMNS: usize = 64;

/// `W' - W` of one module.
#[derive(Debug)]
pub(super) enum Rotation {
    /// Blocks along the diagonal: each is (R - I)^T.
    Diagonal { blocks: Vec<Matrix>, rescale: Option<Vec<f64>> },
    /// What all stages of a butterfly do to the weight, computed once: every row depends on every other.
    Butterfly { delta: Vec<f32> },
}

fn misfit<T>(what: String) -> Result<T, Refusal> {
    Err(Refusal(format!("is oft and does not fit its weight: {what}")))
}

impl Rotation {
    pub(super) fn new(module: &Module, weight: &Tensor) -> Result<Self, Refusal> {
        let Some(stored) = module.get(Slot::OftBlocks) else { return misfit("it has no blocks".to_owned()) };
        let rows = weight.rows();
        let (stages, count, side) = match *stored.shape() {
            [count, side, other] if side == other => (None, count, side),
            [stages, count, side, other] if side == other => (Some(stages), count, side),
            ref shape => return misfit(format!("its blocks have shape {shape:?}")),
        };
        if count * side != rows {
            return misfit(format!("{count} blocks of {side} rows, the weight has {rows}"));
        }
        let rescale = module.get(Slot::OftRescale).map(Tensor::to_f64);
        if rescale.as_ref().is_some_and(|r| r.len() != rows) {
            return misfit(format!("its factors are not {rows}"));
        }
        let rotations = rotations(&stored.to_f64(), side, limit(module, rows));
        match stages {
            None => {
                let less_one =
                    |r: Matrix| Matrix::from_fn(side, side, |i, j| r.get(j, i) - f64::from(u8::from(i == j)));
                Ok(Self::Diagonal { blocks: rotations.into_iter().map(less_one).collect(), rescale })
            }
            Some(stages) => butterfly(stages, side, &rotations, rescale.as_deref(), weight),
        }
    }

    pub(super) fn rows(&self, weight: &Tensor, rows: Range<usize>) -> Vec<f64> {
        let cols = weight.cols();
        match self {
            Self::Butterfly { delta } => {
                delta[rows.start * cols..rows.end * cols].iter().map(|v| f64::from(*v)).collect()
            }
            Self::Diagonal { blocks, rescale } => {
                let side = blocks[0].rows();
                let mut out = Vec::with_capacity(rows.len() * cols);
                let touched = rows.start / side..rows.end.div_ceil(side);
                for (number, block) in blocks.iter().enumerate().take(touched.end).skip(touched.start) {
                    let first = number * side;
                    let wanted = rows.start.max(first)..rows.end.min(first + side);
                    let held = Matrix::new(side, cols, weight.rows_f64(first..first + side));
                    let part = Matrix::from_fn(wanted.len(), side, |i, j| block.get(wanted.start - first + i, j));
                    let mut turned = part.times(&held).into_data();
                    for (row, line) in wanted.zip(turned.chunks_exact_mut(cols.max(1))) {
                        let Some(factor) = rescale.as_ref().map(|r| r[row]) else { continue };
                        let before = held.row(row - first);
                        line.iter_mut().zip(before).for_each(|(d, w)| *d = factor * *d + (factor - 1.0) * w);
                    }
                    out.extend(turned);
                }
                out
            }
        }
    }
}

/// The largest norm that all skew parts together may have: alpha times the outputs, if it is set.
fn limit(module: &Module, rows: usize) -> Option<f64> {
    let alpha = module.alpha.as_ref().and_then(|a| a.to_f64().first().copied())?;
    (alpha.is_finite() && alpha > 0.0).then_some(alpha * rows as f64)
}

/// The rotation of every block.
fn rotations(stored: &[f64], side: usize, limit: Option<f64>) -> Vec<Matrix> {
    let skew = |b: &[f64]| Matrix::from_fn(side, side, |i, j| b[i * side + j] - b[j * side + i]);
    let blocks: Vec<Matrix> = stored.chunks_exact((side * side).max(1)).map(skew).collect();
    let norm = blocks.iter().map(Matrix::norm_squared).sum::<f64>().sqrt();
    let factor = limit.filter(|limit| norm > *limit).map_or(1.0, |limit| limit / norm);
    let identity = Matrix::identity(side);
    let plus = |q: &Matrix, f: f64| Matrix::from_fn(side, side, |i, j| identity.get(i, j) + f * q.get(i, j));
    // (I - Q)^-1 and (I + Q) commute.
    blocks.iter().map(|q| plus(q, -factor).solve(&plus(q, factor))).collect()
}

fn butterfly(
    stages: usize,
    side: usize,
    rotations: &[Matrix],
    rescale: Option<&[f64]>,
    weight: &Tensor,
) -> Result<Rotation, Refusal> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let widest = (side / 2).checked_shl(stages.saturating_sub(1) as u32).unwrap_or(0);
    if !side.is_multiple_of(2) || stages == 0 || widest == 0 || !rows.is_multiple_of(2 * widest) {
        return misfit(format!("{stages} stages of blocks of {side} rows, the weight has {rows}"));
    }
    let count = rows / side;
    let mut delta = vec![0f32; rows * cols];
    for left in (0..cols).step_by(COLUMNS) {
        let columns = left..cols.min(left + COLUMNS);
        let before = Matrix::new(rows, columns.len(), weight.slice_cols(columns.clone()).to_f64());
        let mut held = before.clone();
        for stage in 0..stages {
            held = turned(&held, side, (side / 2) << stage, &rotations[stage * count..(stage + 1) * count]);
        }
        for row in 0..rows {
            let factor = rescale.map_or(1.0, |r| r[row]);
            let target = &mut delta[row * cols + left..row * cols + columns.end];
            for ((t, x), w) in target.iter_mut().zip(held.row(row)).zip(before.row(row)) {
                *t = (factor * x - w) as f32;
            }
        }
    }
    Ok(Rotation::Butterfly { delta })
}

/// One stage: rows that are `apart` rows from each other are brought together two by two, cut into blocks, rotated, and
/// put back.
fn turned(held: &Matrix, side: usize, apart: usize, rotations: &[Matrix]) -> Matrix {
    let source = |at: usize| (at / (2 * apart) * 2 + at % 2) * apart + at / 2 % apart;
    let cols = held.cols();
    let mut out = Matrix::zeros(held.rows(), cols);
    for (block, rotation) in rotations.iter().enumerate() {
        let gathered = Matrix::from_fn(side, cols, |i, j| held.get(source(block * side + i), j));
        let result = rotation.times(&gathered);
        for i in 0..side {
            let row = source(block * side + i);
            out.data_mut()[row * cols..(row + 1) * cols].copy_from_slice(result.row(i));
        }
    }
    out
}
