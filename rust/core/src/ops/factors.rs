//! The factors of a module as tall thin matrices.

use std::ops::Range;

use crate::kind::{Kind, Module, Slot};
use crate::linalg::{Matrix, Tall};
use crate::tensor::Tensor;

/// The rows of an `up` factor: outputs x rank.
pub(crate) struct Ups<'a>(pub(crate) &'a Tensor);

impl Tall for Ups<'_> {
    fn rows(&self) -> usize {
        self.0.rows()
    }

    fn cols(&self) -> usize {
        self.0.cols()
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        Matrix::new(rows.len(), self.0.cols(), self.0.rows_f64(rows))
    }
}

/// The columns of a `down` factor as rows: inputs x rank.
pub(crate) struct Downs<'a>(pub(crate) &'a Tensor);

impl Tall for Downs<'_> {
    fn rows(&self) -> usize {
        self.0.cols()
    }

    fn cols(&self) -> usize {
        self.0.rows()
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        let (count, rank) = (rows.len(), self.0.rows());
        Matrix::new(rank, count, self.0.slice_cols(rows).to_f64()).transposed()
    }
}

/// `up` and `down` of a plain LoRA; `None` for other kinds and for factors with a Tucker core between them.
pub(crate) fn factors(module: &Module) -> Option<(&Tensor, &Tensor)> {
    let plain = module.kind == Kind::Lora && module.get(Slot::Mid).is_none();
    plain.then(|| module.get(Slot::Up).zip(module.get(Slot::Down))).flatten()
}
