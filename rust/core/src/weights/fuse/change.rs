//! What one adapter module does to rows of a weight, with its factors in float64.

use std::ops::Range;

use crate::kind::{Kind, Module, Slot};
use crate::linalg::Matrix;
use crate::ops;
use crate::ops::Based;
use crate::tensor::Tensor;

/// A difference to a parameter, or its replacement.
#[derive(Debug)]
pub(super) enum Change {
    /// `scale * up @ down`; of two such the elementwise product.
    Factors { scale: f64, up: Tensor, down: Matrix, times: Option<(Tensor, Matrix)> },
    /// `scale * kron(w1, w2)`.
    Kronecker { scale: f64, w1: Matrix, w2: Matrix },
    /// What says its difference only together with the weight, times a strength.
    Based { strength: f64, based: Based },
    /// A stored difference.
    Stored(Tensor),
    /// Takes the parameter's place.
    Replaced(Tensor),
}

impl Change {
    /// Rows and columns of what a module does to the weight; `Ok(None)` if it leaves it as it is, else why that cannot
    /// be computed. Reads no tensor.
    pub(super) fn size_on_weight(module: &Module) -> Result<Option<(usize, usize)>, String> {
        let tucker = [Slot::HadaT1, Slot::HadaT2, Slot::LokrT2].iter().any(|s| module.get(*s).is_some());
        let size = |slot: Slot| module.get(slot).map(|t| (t.rows(), t.cols()));
        match module.kind {
            // Asked of the weight itself.
            Kind::Oft | Kind::Glora | Kind::Ia3 => Ok(None),
            _ if Based::needs_weight(module) => Ok(None),
            _ if tucker => Err(format!("is {} with a Tucker core", module.kind.name())),
            Kind::Lora => match (ops::shape(module), module.get(Slot::Mid), module.get(Slot::Down)) {
                (Some((rows, cols)), Some(core), Some(down)) => {
                    let kernel = core.cols() / down.rows().max(1);
                    match core.cols() == kernel * down.rows()
                        && module.get(Slot::Up).map(Tensor::cols) == Some(core.rows())
                    {
                        true => Ok(Some((rows, cols * kernel))),
                        false => Err("has a Tucker core that does not fit its factors".to_owned()),
                    }
                }
                (shape, ..) => Ok(shape),
            },
            Kind::Loha | Kind::Lokr => Ok(ops::shape(module)),
            Kind::Full | Kind::Norm | Kind::Bias => Ok(size(Slot::Diff).or_else(|| size(Slot::WNorm))),
            Kind::Set => Ok(size(Slot::Set)),
        }
    }

    /// The change of the weight, for a module that [`Change::size_on_weight`] takes.
    pub(super) fn on_weight(module: &Module) -> Option<Self> {
        let t = |slot: Slot| module.get(slot);
        let scale = module.scale;
        match module.kind {
            Kind::Lora => {
                let (up, down) = (t(Slot::Up)?.clone(), t(Slot::Down)?);
                let down = t(Slot::Mid).map_or_else(|| matrix(down), |core| through_core(core, down));
                Some(Change::Factors { scale, up, down, times: None })
            }
            Kind::Loha => Some(Change::Factors {
                scale,
                up: t(Slot::HadaW1A)?.clone(),
                down: matrix(t(Slot::HadaW1B)?),
                times: Some((t(Slot::HadaW2A)?.clone(), matrix(t(Slot::HadaW2B)?))),
            }),
            Kind::Lokr => {
                let full = |whole: Slot, a: Slot, b: Slot| match t(whole) {
                    Some(whole) => Some(matrix(whole)),
                    None => Some(matrix(t(a)?).times(&matrix(t(b)?))),
                };
                let w1 = full(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
                Some(Change::Kronecker { scale, w1, w2: full(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)? })
            }
            Kind::Set => t(Slot::Set).cloned().map(Change::Replaced),
            _ => t(Slot::Diff).or_else(|| t(Slot::WNorm)).cloned().map(Change::Stored),
        }
    }

    /// The change of the bias.
    pub(super) fn on_bias(module: &Module) -> Option<Self> {
        module.get(Slot::DiffB).or_else(|| module.get(Slot::BNorm)).cloned().map(Change::Stored)
    }

    /// Rows and columns of the difference.
    pub(super) fn size(&self) -> (usize, usize) {
        match self {
            Change::Factors { up, down, .. } => (up.rows(), down.cols()),
            Change::Kronecker { w1, w2, .. } => (w1.rows() * w2.rows(), w1.cols() * w2.cols()),
            Change::Based { based, .. } => based.shape(),
            Change::Stored(tensor) | Change::Replaced(tensor) => (tensor.rows(), tensor.cols()),
        }
    }

    /// Adds some rows of the difference; a difference of fewer columns is one of the first.
    pub(super) fn add(&self, rows: Range<usize>, out: &mut Matrix) {
        match self {
            Change::Factors { scale, up, down, times: None } if down.cols() == out.cols() => {
                out.add_product(*scale, &rows_of(up, rows), down);
            }
            Change::Factors { scale, up, down, times } => {
                let mut delta = rows_of(up, rows.clone()).times(down);
                if let Some((up, down)) = times {
                    let other = rows_of(up, rows).times(down);
                    delta.data_mut().iter_mut().zip(other.data()).for_each(|(x, y)| *x *= y);
                }
                add_lines(*scale, delta.data(), delta.cols(), out);
            }
            Change::Kronecker { scale, w1, w2 } => {
                let cols = out.cols();
                for (row, line) in rows.zip(out.data_mut().chunks_exact_mut(cols.max(1))) {
                    let (outer, inner) = (w1.row(row / w2.rows()), w2.row(row % w2.rows()));
                    for (part, a) in line.chunks_mut(inner.len().max(1)).zip(outer) {
                        let factor = scale * a;
                        part.iter_mut().zip(inner).for_each(|(o, b)| *o += factor * b);
                    }
                }
            }
            Change::Based { strength, based } => add_lines(*strength, &based.rows(rows), based.shape().1, out),
            Change::Stored(tensor) => add_lines(1.0, &tensor.rows_f64(rows), tensor.cols(), out),
            // Not a difference: whoever has the base weights takes its rows instead.
            Change::Replaced(_) => {}
        }
    }
}

fn add_lines(scale: f64, values: &[f64], cols: usize, out: &mut Matrix) {
    let width = out.cols().max(1);
    for (line, values) in out.data_mut().chunks_exact_mut(width).zip(values.chunks_exact(cols.max(1))) {
        line.iter_mut().zip(values).for_each(|(o, v)| *o += scale * v);
    }
}

fn matrix(tensor: &Tensor) -> Matrix {
    rows_of(tensor, 0..tensor.rows())
}

pub(super) fn rows_of(tensor: &Tensor, rows: Range<usize>) -> Matrix {
    Matrix::new(rows.len(), tensor.cols(), tensor.rows_f64(rows))
}

/// `down` seen through a Tucker core (LoCon, `lora_mid`): `sum_q mid[p, q, k] down[q, i]` at row p and column (i, k).
fn through_core(core: &Tensor, down: &Tensor) -> Matrix {
    let (rank, inputs) = (down.rows(), down.cols());
    let kernel = core.cols() / rank.max(1);
    let (core, down) = (matrix(core), matrix(down));
    let width = inputs * kernel;
    let mut out = Matrix::zeros(core.rows(), width);
    for (p, line) in out.data_mut().chunks_exact_mut(width.max(1)).enumerate() {
        for (q, k) in (0..rank).flat_map(|q| (0..kernel).map(move |k| (q, k))) {
            let factor = core.get(p, q * kernel + k);
            down.row(q).iter().enumerate().for_each(|(i, x)| line[i * kernel + k] += factor * x);
        }
    }
    out
}
