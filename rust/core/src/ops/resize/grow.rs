//! More ranks with the same delta.

use std::ops::Range;
use std::sync::Arc;

use super::Method;
use crate::cast::Loss;
use crate::dtype::Dtype;
use crate::kind::{Module, Slot};
use crate::linalg::Matrix;
use crate::ops::factors::factors;
use crate::random::Counter;
use crate::tensor::{Derived, Tensor};

/// Gives a module more ranks. `None` for NaN and infinities where they matter.
pub(super) fn grow(module: &mut Module, method: Method, rank: usize, seed: u64, name: &str) -> Option<()> {
    let (up, down) = factors(module)?;
    let (before, rows, cols) = (down.rows(), up.rows(), down.cols());
    let shaped = |tensor: &Tensor, axis: usize| {
        let mut shape = tensor.shape().to_vec();
        shape[axis] = rank;
        shape
    };
    let wide = up.padded(rows, rank).reshaped(shaped(up, 1));
    let tall = match method {
        Method::Orthogonal => {
            let norm = down.to_f64().iter().map(|x| x * x).sum::<f64>();
            if !norm.is_finite() {
                return None;
            }
            let completion = Completion {
                down: down.clone(),
                rank,
                // The mean square of a row.
                length: if norm > 0.0 { (norm / before as f64).sqrt() } else { 1.0 },
                random: Counter::new(seed, name),
            };
            Tensor::stack_rows(&[
                down.clone().reshaped(vec![before, cols]),
                Tensor::derived(Arc::new(completion)).cast(down.dtype()),
            ])
        }
        _ => down.clone().reshaped(vec![before, cols]).padded(rank, cols),
    };
    let tall = tall.reshaped(shaped(down, 0));
    module.tensors.insert(Slot::Up, wide);
    module.tensors.insert(Slot::Down, tall);
    module.alpha = None;
    module.regrouped = true;
    module.without_origin();
    Some(())
}

/// Rows that are orthonormal to those of a factor and to each other, up to their length.
#[derive(Debug)]
struct Completion {
    down: Tensor,
    rank: usize,
    length: f64,
    random: Counter,
}

impl Derived for Completion {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.down]
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.rank - self.down.rows(), self.down.cols())
    }

    fn computes(&self) -> bool {
        true
    }

    fn block(&self) -> usize {
        self.size().0
    }

    /// The last columns of the Q of a Householder QR of [down^T, random]: orthonormal even where `down` lacks rank.
    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let (before, cols) = (self.down.rows(), self.down.cols());
        let down = Matrix::new(before, cols, self.down.to_f64());
        let stacked = Matrix::from_fn(cols, self.rank, |i, j| match j < before {
            true => down.get(j, i),
            false => self.random.normal((i * self.rank + j) as u64),
        });
        let q = stacked.orthonormalised();
        let values = rows.flat_map(|row| (0..cols).map(move |i| (i, before + row)));
        out.as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(values)
            .for_each(|(o, (i, j))| *o = (q.get(i, j) * self.length).to_le_bytes());
        Loss::default()
    }
}
