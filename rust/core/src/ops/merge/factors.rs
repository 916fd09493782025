//! Merging tensors element by element, when they are read: factors as PEFT does, and what has no factors.

use std::ops::Range;
use std::sync::Arc;

use super::blend::{Blend, Part};
use super::options::{MergeOptions, Method};
use super::{Factored, Product, Trouble, Weighted, dtype, refuse};
use crate::cast::Loss;
use crate::dtype::Dtype;
use crate::linalg::{Matrix, Tall, thin_root};
use crate::ops::factors::{Downs, Ups};
use crate::tensor::{Derived, Tensor};

/// A tensor as a matrix; a vector is one row.
#[derive(Debug, Clone)]
struct Elements(Tensor);

impl Elements {
    fn is_vector(&self) -> bool {
        self.0.shape().len() < 2
    }
}

impl Tall for Elements {
    fn rows(&self) -> usize {
        if self.is_vector() { 1 } else { self.0.rows() }
    }

    fn cols(&self) -> usize {
        if self.is_vector() { self.0.rows() } else { self.0.cols() }
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        let (count, cols) = (rows.len(), self.cols());
        let values = if self.is_vector() { self.0.to_f64() } else { self.0.rows_f64(rows) };
        Matrix::new(count, cols, values)
    }
}

/// A tensor whose elements are merged when they are read.
#[derive(Debug)]
struct Lazy(Blend<Elements>);

impl Lazy {
    fn first(&self) -> &Elements {
        self.0.parts().next().expect("at least one term")
    }
}

impl Derived for Lazy {
    fn parts(&self) -> Vec<&Tensor> {
        self.0.parts().map(|e| &e.0).collect()
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.first().0.rows(), self.first().0.cols())
    }

    fn computes(&self) -> bool {
        true
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let values = match self.first().is_vector() {
            true => self.0.read(0..1).data()[rows].to_vec(),
            false => self.0.read(rows).into_data(),
        };
        out.as_chunks_mut::<8>().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
        Loss::default()
    }
}

fn lazy(parts: Vec<Part<Elements>>, options: &MergeOptions, name: &str) -> Tensor {
    let shape = parts[0].matrix.0.shape().to_vec();
    let dtype = dtype(parts.iter().map(|p| &p.matrix.0));
    Tensor::derived(Arc::new(Lazy(Blend::new(parts, options, name)))).cast(dtype).reshaped(shape)
}

/// Merges tensors of one shape that have no factors: differences of weights, biases, norms.
pub(super) fn elements(parts: Vec<(&Tensor, &Weighted<'_>)>, options: &MergeOptions, name: &str) -> Tensor {
    let part = |(tensor, t): (&Tensor, &Weighted<'_>)| Part {
        matrix: Elements(tensor.clone()),
        weight: t.weight,
        term: t.term,
    };
    lazy(parts.into_iter().map(part).collect(), options, name)
}

/// Merges `up` and `down` apart. Strength and scale are split evenly between the two, the sign goes on `down` (PEFT,
/// `_generalized_task_arithmetic_weighted_adapter`). All terms have one rank.
pub(super) fn merge(parts: &[Factored], options: &MergeOptions, name: &str) -> Result<Product, Trouble> {
    if let Some(w) = parts.windows(2).find(|w| w[0].down.rows() != w[1].down.rows()) {
        let (a, b) = (w[0].down.rows(), w[1].down.rows());
        return refuse(format!(
            "has rank {a} in one and rank {b} in another of them, and factors only merge at one rank"
        ));
    }
    let strength = |p: &Factored| p.weight * p.scale;
    let part = |tensor: &Tensor, weight: f64, term: usize| Part { matrix: Elements(tensor.clone()), weight, term };
    let ups = parts.iter().map(|p| part(&p.up, strength(p).abs().sqrt(), p.term)).collect();
    let signed = |x: f64| x.abs().sqrt().copysign(x);
    let downs = parts.iter().map(|p| part(&p.down, signed(strength(p)), p.term)).collect();
    // The factor on the result is split as strengths are.
    let halved = |lambda| MergeOptions { lambda, ..options.clone() };
    let up = lazy(ups, &halved(options.lambda.abs().sqrt()), &format!("{name} up"));
    let down = lazy(downs, &halved(signed(options.lambda)), &format!("{name} down"));
    let (norm, relative_error) = match options.method {
        Method::Linear => {
            let (norm, error) = linear_error(parts, options.lambda);
            (Some(norm), Some(error))
        }
        _ => (None, None),
    };
    Ok(Product { up, down, norm, relative_error })
}

/// The Frobenius norm of the weighted sum of the deltas, and what the product of added factors differs from it,
/// relative to that norm.
///
/// Both are `up @ X @ down` of the stacked factors with a small X: diagonal for the one, every block filled for the
/// other. Their norms are those of `R_up X R_down^T` with the triangular factors.
fn linear_error(parts: &[Factored], lambda: f64) -> (f64, f64) {
    let stacked = |tensors: Vec<Tensor>, down: bool| match down {
        true => thin_root(&Downs(&Tensor::stack_rows(&tensors))),
        false => thin_root(&Ups(&Tensor::stack_cols(&tensors))),
    };
    let left = stacked(parts.iter().map(|p| p.up.clone()).collect(), false);
    let right = stacked(parts.iter().map(|p| p.down.clone()).collect(), true);
    let rank = parts[0].down.rows();
    let strength = |p: &Factored| p.weight * p.scale;
    let wanted = |i: usize, j: usize| if i == j { strength(&parts[i / rank]) } else { 0.0 };
    let given = |i: usize, j: usize| {
        let (a, b) = (strength(&parts[i / rank]), strength(&parts[j / rank]));
        if i % rank == j % rank { (a.abs() * b.abs()).sqrt().copysign(b) } else { 0.0 }
    };
    let all = parts.len() * rank;
    let size =
        |x: &dyn Fn(usize, usize) -> f64| left.times(&Matrix::from_fn(all, all, x)).times_transpose(&right).norm();
    let (norm, error) = (size(&wanted), size(&|i, j| given(i, j) - wanted(i, j)));
    (lambda.abs() * norm, if norm > 0.0 { error / norm } else { 0.0 })
}
