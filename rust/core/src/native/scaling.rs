//! Smoothing factors, multiplied into and out of low-rank factors. Each element is rounded once.

use crate::dtype::Dtype;
use crate::kind::{Module, Slot};
use crate::tensor::{Pairing, Tensor};

/// Column k of `down` times factor k.
pub(super) fn multiply_columns(module: &mut Module, factor: &[f64]) {
    columns(module, factor.iter().copied());
}

/// Column k of `down` divided by factor k.
pub(super) fn divide_columns(module: &mut Module, factor: &[f64]) {
    columns(module, factor.iter().map(|v| 1.0 / v));
}

/// Row n of `up` times factor n.
pub(super) fn multiply_rows(module: &mut Module, factor: &[f64]) {
    rows(module, factor.iter().copied());
}

/// Row n of `up` divided by factor n.
pub(super) fn divide_rows(module: &mut Module, factor: &[f64]) {
    rows(module, factor.iter().map(|v| 1.0 / v));
}

fn columns(module: &mut Module, factor: impl ExactSizeIterator<Item = f64>) {
    *module = module.tightened();
    if let Some(down) = module.tensors.get_mut(&Slot::Down) {
        let vector = float64(vec![1, factor.len()], factor);
        *down = Tensor::product(down, &vector, Pairing::Cross, Pairing::Same).cast(down.dtype());
    }
}

fn rows(module: &mut Module, factor: impl ExactSizeIterator<Item = f64>) {
    *module = module.tightened();
    if let Some(up) = module.tensors.get_mut(&Slot::Up) {
        *up = by_rows(up, factor);
    }
}

/// Element n of a vector times factor n.
pub(super) fn multiply_vector(vector: &Tensor, factor: &[f64]) -> Tensor {
    by_rows(vector, factor.iter().copied())
}

/// Element n of a vector divided by factor n.
pub(super) fn divide_vector(vector: &Tensor, factor: &[f64]) -> Tensor {
    by_rows(vector, factor.iter().map(|v| 1.0 / v))
}

fn by_rows(tensor: &Tensor, factor: impl ExactSizeIterator<Item = f64>) -> Tensor {
    let column = float64(vec![factor.len(), 1], factor);
    let product = Tensor::product(tensor, &column, Pairing::Same, Pairing::Cross);
    product.cast(tensor.dtype()).reshaped(tensor.shape().to_vec())
}

/// A constant in float64, so that what is computed with it is rounded once.
fn float64(shape: Vec<usize>, values: impl Iterator<Item = f64>) -> Tensor {
    Tensor::constant(Dtype::F64, shape, values.flat_map(f64::to_le_bytes).collect::<Vec<u8>>())
}
