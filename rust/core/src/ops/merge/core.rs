//! Merging in core space: the deltas of a module in two orthonormal bases that all of them share.
//!
//! The bases are the left singular vectors of `[D_1 ... D_N]` and those of `[D_1^T ... D_N^T]` (KnOTS, Stoica et al.
//! 2024, has the first; Core Space, Panariello et al. 2025, has both, from stacked factors). They depend on the deltas
//! alone, so that the result does not depend on how an adapter was factored. Between them a delta is a small matrix,
//! its core; the rule works on the elements of the cores, and the merged core is a LoRA without any loss.

use std::ops::Range;

use super::blend::{Blend, Part};
use super::options::MergeOptions;
use super::{Factored, Product, dtype, shapes};
use crate::linalg::{Matrix, Svd, Tall, svd, thin_root};
use crate::ops::factors::{Downs, Ups};
use crate::tensor::Tensor;

/// Directions below this share of the largest are those of rounding in float32, not of an adapter: of a stack of
/// adapters that share some, they would become directions of their own.
const NOISE: f64 = 1e-6;

/// Singular values of the merged core below this share of the largest are rounding in float64.
const FINE_NOISE: f64 = 1e-13;

/// Merges terms of any ranks. All factors are finite.
pub(super) fn merge(parts: &[Factored], options: &MergeOptions, name: &str) -> Product {
    let ups: Vec<Tensor> = parts.iter().map(|p| p.up.clone()).collect();
    let downs: Vec<Tensor> = parts.iter().map(|p| p.down.clone()).collect();
    let (up, down) = (Tensor::stack_cols(&ups), Tensor::stack_rows(&downs));
    let (left_root, right_root) = (thin_root(&Ups(&up)), thin_root(&Downs(&down)));
    let ranges = ranges(parts);
    // All deltas in the bases of the triangular factors: D_i = Q_up cores_i Q_down^T.
    let cores: Vec<Matrix> = parts
        .iter()
        .zip(&ranges)
        .map(|(p, r)| scaled(columns(&left_root, r).times_transpose(&columns(&right_root, r)), p.scale))
        .collect();
    let transposed: Vec<Matrix> = cores.iter().map(Matrix::transposed).collect();
    let left = Basis::new(&cores, &scaled_roots(parts, &right_root), &ranges, &Ups(&up));
    let right = Basis::new(&transposed, &scaled_roots(parts, &left_root), &ranges, &Downs(&down));
    let inner = |core: &Matrix| left.inside.transpose_times(core).times(&right.inside);
    let seen = parts.iter().zip(&cores);
    let blended = seen.map(|(p, core)| Part { matrix: inner(core), weight: p.weight, term: p.term }).collect();
    let core = Blend::new(blended, options, name);
    let core = core.read(0..core.rows());
    let Svd { u, s, v } = svd(&core).expect("the factors are finite");
    let rank = s.iter().take_while(|x| **x > FINE_NOISE * s[0] && **x > 0.0).count();
    product(parts, &up, &down, rank, |k| {
        let shares: Vec<f64> = s[..k].iter().map(|x| x.sqrt()).collect();
        let x = left.outside.times(&u.first_cols(k)).scaled_cols(&shares);
        let y = right.outside.times(&v.first_cols(k)).scaled_cols(&shares).transposed();
        (x, y, s.iter().map(|x| x * x).sum::<f64>().sqrt())
    })
}

/// The factors `up @ x` and `y @ down`; those of no rank at all are one rank of zeros.
fn product(
    parts: &[Factored],
    up: &Tensor,
    down: &Tensor,
    rank: usize,
    small: impl Fn(usize) -> (Matrix, Matrix, f64),
) -> Product {
    let (up_shape, down_shape) = shapes(&parts[0], rank.max(1));
    let dtype = dtype([up, down].into_iter());
    if rank == 0 {
        let (up, down) = (Tensor::zeros(dtype, up_shape), Tensor::zeros(dtype, down_shape));
        return Product { up, down, norm: Some(0.0), relative_error: None };
    }
    let (x, y, norm) = small(rank);
    let up = up.times(x).cast(dtype).reshaped(up_shape);
    let down = down.combined(y).cast(dtype).reshaped(down_shape);
    Product { up, down, norm: Some(norm), relative_error: None }
}

/// An orthonormal basis of what all deltas reach on one side.
struct Basis {
    /// Its vectors in the basis of the stack's triangular factor.
    inside: Matrix,
    /// What the stack is multiplied by to give them.
    outside: Matrix,
}

impl Basis {
    /// The left singular vectors of the cores side by side, of which `stack` times `root` are the outer form: core i is
    /// the columns `ranges[i]` of the stack's triangular factor times `opposite[i]`.
    ///
    /// With `[C_1 ... C_N] = U S V^T` they are `U = sum_i C_i V_i / S`, and so `stack @ T` with the rows
    /// `T_i = opposite_i V_i / S`: no inverse is taken of factors that may be nearly dependent.
    fn new(cores: &[Matrix], opposite: &[Matrix], ranges: &[Range<usize>], stack: &dyn Tall) -> Self {
        let side = cores[0].rows();
        let width = cores[0].cols();
        let beside = Matrix::from_fn(side, cores.len() * width, |i, j| cores[j / width].get(i, j % width));
        let Svd { u, s, v } = svd(&beside).expect("the factors are finite");
        let rank = s.iter().take_while(|x| **x > NOISE * s[0] && **x > 0.0).count();
        let inverse: Vec<f64> = s[..rank].iter().map(|x| x.recip()).collect();
        let mut outside = Matrix::zeros(side, rank);
        for ((at, opposite), range) in opposite.iter().enumerate().zip(ranges) {
            let block = Matrix::from_fn(width, rank, |i, j| v.get(at * width + i, j));
            let rows = opposite.times(&block).scaled_cols(&inverse);
            outside.data_mut()[range.start * rank..range.end * rank].copy_from_slice(rows.data());
        }
        let signs = signs(stack, &outside);
        Self { inside: u.first_cols(rank).scaled_cols(&signs), outside: outside.scaled_cols(&signs) }
    }
}

/// 1 or -1 for each column of `stack @ small`: that which makes its largest element positive. Singular vectors have no
/// sign of their own, and a rule may prefer one where there is a draw.
fn signs(stack: &dyn Tall, small: &Matrix) -> Vec<f64> {
    let mut largest = vec![0.0f64; small.cols()];
    for (_, rows) in super::cut::tiles(stack) {
        let vectors = rows.times(small);
        for i in 0..vectors.rows() {
            for (most, x) in largest.iter_mut().zip(vectors.row(i)) {
                if x.abs() > most.abs() {
                    *most = *x;
                }
            }
        }
    }
    largest.into_iter().map(|x| if x < 0.0 { -1.0 } else { 1.0 }).collect()
}

/// `scale_i R_i^T`, r_i x R: the other half of every core.
fn scaled_roots(parts: &[Factored], root: &Matrix) -> Vec<Matrix> {
    let ranges = ranges(parts);
    parts.iter().zip(&ranges).map(|(p, r)| scaled(columns(root, r).transposed(), p.scale)).collect()
}

/// The columns of the stacks that belong to each term.
fn ranges(parts: &[Factored]) -> Vec<Range<usize>> {
    let mut start = 0;
    let range = |p: &Factored| {
        let range = start..start + p.down.rows();
        start = range.end;
        range
    };
    parts.iter().map(range).collect()
}

fn columns(matrix: &Matrix, range: &Range<usize>) -> Matrix {
    Matrix::from_fn(matrix.rows(), range.len(), |i, j| matrix.get(i, range.start + j))
}

fn scaled(matrix: Matrix, factor: f64) -> Matrix {
    let factors = vec![factor; matrix.cols()];
    matrix.scaled_cols(&factors)
}
