//! The effective weight difference of a module, in float64.

use std::ops::Range;

use crate::kind::{Kind, Module, Slot};
use crate::tensor::Tensor;

/// Rows and columns of the delta; `None` for kinds that have none without base weights.
pub fn shape(module: &Module) -> Option<(usize, usize)> {
    if module.has_core() {
        return shape(&module.flattened());
    }
    let dims = |slot: Slot| module.get(slot).map(|t| (t.rows(), t.cols()));
    match module.kind {
        Kind::Lora => Some((dims(Slot::Up)?.0, dims(Slot::Down)?.1)),
        Kind::Loha => Some((dims(Slot::HadaW1A)?.0, dims(Slot::HadaW1B)?.1)),
        Kind::Lokr => {
            let w1 = dims(Slot::LokrW1).or_else(|| Some((dims(Slot::LokrW1A)?.0, dims(Slot::LokrW1B)?.1)))?;
            let w2 = dims(Slot::LokrW2).or_else(|| Some((dims(Slot::LokrW2A)?.0, dims(Slot::LokrW2B)?.1)))?;
            Some((w1.0 * w2.0, w1.1 * w2.1))
        }
        Kind::Full => dims(Slot::Diff),
        _ => None,
    }
}

/// Some rows of the delta, row by row, in float64.
///
/// LoRA: scale * up @ down. LoHa: scale * (w1_a w1_b) * (w2_a w2_b) elementwise. LoKr: scale * kron(w1, w2)
/// (formulas: LyCORIS, `lycoris/functional`); Tucker cores as in [`Module::flattened`]. DoRA's magnitude is not part of it: it needs the base weight.
/// `None` where [`shape`] is.
pub fn delta_rows(module: &Module, rows: Range<usize>) -> Option<Vec<f64>> {
    if module.has_core() {
        return delta_rows(&module.flattened(), rows);
    }
    let (_, cols) = shape(module)?;
    let t = |slot: Slot| module.get(slot);
    let scale = module.scale;
    match module.kind {
        Kind::Lora => Some(product(t(Slot::Up)?, t(Slot::Down)?, rows, scale)),
        Kind::Loha => {
            let mut out = product(t(Slot::HadaW1A)?, t(Slot::HadaW1B)?, rows.clone(), scale);
            let other = product(t(Slot::HadaW2A)?, t(Slot::HadaW2B)?, rows, 1.0);
            out.iter_mut().zip(other).for_each(|(a, b)| *a *= b);
            Some(out)
        }
        Kind::Lokr => {
            let full = |whole, a, b| match t(whole) {
                Some(t) => Some((t.to_f64(), t.rows(), t.cols())),
                None => {
                    let (a, b) = (t(a)?, t(b)?);
                    Some((product(a, b, 0..a.rows(), 1.0), a.rows(), b.cols()))
                }
            };
            let (w1, _, w1_cols) = full(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
            let (w2, w2_rows, w2_cols) = full(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)?;
            let mut out = Vec::with_capacity(rows.len() * cols);
            for row in rows {
                let (i, k) = (row / w2_rows, row % w2_rows);
                for a in &w1[i * w1_cols..(i + 1) * w1_cols] {
                    out.extend(w2[k * w2_cols..(k + 1) * w2_cols].iter().map(|b| scale * a * b));
                }
            }
            Some(out)
        }
        Kind::Full => Some(t(Slot::Diff)?.rows_f64(rows)),
        _ => None,
    }
}

/// Rows of `scale * a @ b`.
fn product(a: &Tensor, b: &Tensor, rows: Range<usize>, scale: f64) -> Vec<f64> {
    let (rank, cols) = (b.rows(), b.cols());
    let left = a.rows_f64(rows.clone());
    let right = b.to_f64();
    let mut out = vec![0.0; rows.len() * cols];
    for (row, target) in out.chunks_exact_mut(cols.max(1)).enumerate() {
        for k in 0..rank {
            let factor = scale * left[row * rank + k];
            if factor != 0.0 {
                let line = &right[k * cols..(k + 1) * cols];
                target.iter_mut().zip(line).for_each(|(o, x)| *o += factor * x);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::dtype::Dtype;

    fn matrix(rows: usize, cols: usize, values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, vec![rows, cols], bytes)
    }

    #[test]
    fn kronecker_by_hand() {
        let tensors =
            BTreeMap::from([(Slot::LokrW1, matrix(1, 2, &[2., 3.])), (Slot::LokrW2, matrix(2, 2, &[1., 2., 3., 4.]))]);
        let m = Module::new(Kind::Lokr, tensors);
        assert_eq!(delta_rows(&m, 0..2).expect("lokr"), [2., 4., 3., 6., 6., 8., 9., 12.]);
    }

    #[test]
    fn hadamard_by_hand() {
        let tensors = BTreeMap::from([
            (Slot::HadaW1A, matrix(2, 1, &[1., 2.])),
            (Slot::HadaW1B, matrix(1, 2, &[3., 4.])),
            (Slot::HadaW2A, matrix(2, 1, &[5., 6.])),
            (Slot::HadaW2B, matrix(1, 2, &[7., 8.])),
        ]);
        let mut m = Module::new(Kind::Loha, tensors);
        m.scale = 0.5;
        assert_eq!(delta_rows(&m, 1..2).expect("loha"), [0.5 * 6. * 42., 0.5 * 8. * 48.]);
    }
}
