//! LoHa and LoKr as plain LoRA, exactly.
//!
//! LoHa: (w1_a w1_b) * (w2_a w2_b) = up down, where column (p, q) of `up` is the product of column p of w1_a and column
//! q of w2_a, and row (p, q) of `down` that of row p of w1_b and row q of w2_b. LoKr: kron(p1 q1, p2 q2) =
//! kron(p1, p2) kron(q1, q2), where a factor that is stored whole is itself times the identity on its shorter side.
//! (Mixed-product identities; the formulas of the deltas are those of LyCORIS, `lycoris/functional`.)

use std::collections::BTreeMap;

use super::module::refuse;
use super::{Kind, Module, Refusal, Slot};
use crate::dtype::Dtype;
use crate::tensor::{Pairing, Tensor};

impl Module {
    /// The same delta as a plain LoRA of the rank that its factors give, if that is at most `max_rank`. Every element
    /// of a factor is one product of two stored numbers, rounded once. What is plain already comes back as it is.
    pub fn expanded(&self, max_rank: usize) -> Result<Module, Refusal> {
        if !matches!(self.kind, Kind::Loha | Kind::Lokr) {
            return Ok(self.clone());
        }
        if self.is_dora() {
            return refuse("is DoRA, which needs the base weights");
        }
        if [Slot::HadaT1, Slot::HadaT2, Slot::LokrT2].iter().any(|s| self.get(*s).is_some()) {
            return refuse("has a Tucker core, which has no plain form here");
        }
        let missing = || Refusal("lacks a factor".to_owned());
        let (up, down) = match self.kind {
            Kind::Loha => self.hadamard(max_rank).ok_or_else(missing)??,
            _ => self.kronecker(max_rank).ok_or_else(missing)??,
        };
        let mut tensors = BTreeMap::from([(Slot::Down, down), (Slot::Up, up)]);
        tensors.extend(self.get(Slot::DiffB).map(|bias| (Slot::DiffB, bias.clone())));
        let mut out = Module::new(Kind::Lora, tensors);
        out.scale = self.scale;
        out.alpha_source = self.alpha_source;
        out.inputs.clone_from(&self.inputs);
        out.regrouped = true;
        Ok(out)
    }

    fn hadamard(&self, max_rank: usize) -> Option<Result<(Tensor, Tensor), Refusal>> {
        let [w1a, w1b] = [self.get(Slot::HadaW1A)?, self.get(Slot::HadaW1B)?];
        let [w2a, w2b] = [self.get(Slot::HadaW2A)?, self.get(Slot::HadaW2B)?];
        Some(self.within(w1b.rows() * w2b.rows(), max_rank).map(|()| {
            let up = Tensor::product(w1a, w2a, Pairing::Same, Pairing::Cross);
            (up, Tensor::product(w1b, w2b, Pairing::Cross, Pairing::Same))
        }))
    }

    fn kronecker(&self, max_rank: usize) -> Option<Result<(Tensor, Tensor), Refusal>> {
        let (p1, q1) = self.factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
        let (p2, q2) = self.factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)?;
        Some(self.within(q1.rows() * q2.rows(), max_rank).map(|()| {
            let kron = |a: &Tensor, b: &Tensor| Tensor::product(a, b, Pairing::Cross, Pairing::Cross);
            (kron(&p1, &p2), kron(&q1, &q2))
        }))
    }

    /// A Kronecker factor as a product: as it is stored, or with the identity on its shorter side.
    fn factor(&self, whole: Slot, left: Slot, right: Slot) -> Option<(Tensor, Tensor)> {
        let Some(w) = self.get(whole) else {
            return Some((self.get(left)?.clone(), self.get(right)?.clone()));
        };
        Some(match w.rows() < w.cols() {
            true => (identity(w.rows(), w.dtype()), w.clone()),
            false => (w.clone(), identity(w.cols(), w.dtype())),
        })
    }

    fn within(&self, rank: usize, max_rank: usize) -> Result<(), Refusal> {
        if rank <= max_rank {
            return Ok(());
        }
        refuse(format!(
            "is {}, whose exact plain form has rank {rank}; `--max-rank {rank}` accepts it (the limit is {max_rank})",
            self.kind.name()
        ))
    }
}

fn identity(n: usize, dtype: Dtype) -> Tensor {
    let one = Tensor::constant(Dtype::F32, vec![1, 1], 1f32.to_le_bytes().to_vec());
    Tensor::block_diagonal(&vec![one; n]).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::delta_rows;

    fn noise(rows: usize, cols: usize, seed: u32) -> Tensor {
        let value =
            |i: usize| (((i as u32 + 1) * (2 * seed + 7)).wrapping_mul(2_654_435_761) >> 20) as f32 / 2048.0 - 1.0;
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| value(i).to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, vec![rows, cols], bytes)
    }

    fn agrees(kind: Kind, tensors: &[(Slot, Tensor)], rank: usize) {
        let mut module = Module::new(kind, tensors.iter().cloned().collect());
        module.scale = 0.75;
        let plain = module.expanded(rank).expect("within the limit");
        assert_eq!((plain.kind, plain.rank()), (Kind::Lora, Some(rank)));
        let rows = crate::ops::shape(&module).expect("has a delta").0;
        let (want, have) = (delta_rows(&module, 0..rows), delta_rows(&plain, 0..rows));
        for (x, y) in want.expect("delta").iter().zip(have.expect("delta")) {
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
        assert!(module.expanded(rank - 1).is_err_and(|r| r.0.contains(&format!("--max-rank {rank}"))));
    }

    #[test]
    fn plain_forms_have_the_delta() {
        use Slot::*;
        let hada = [
            (HadaW1A, noise(6, 2, 1)),
            (HadaW1B, noise(2, 5, 2)),
            (HadaW2A, noise(6, 3, 3)),
            (HadaW2B, noise(3, 5, 4)),
        ];
        agrees(Kind::Loha, &hada, 6);
        let (w1, w2) = (noise(2, 3, 5), noise(4, 4, 6));
        agrees(Kind::Lokr, &[(LokrW1, w1.clone()), (LokrW2, w2.clone())], 8);
        let (a, b) = (noise(4, 2, 7), noise(2, 5, 8));
        agrees(Kind::Lokr, &[(LokrW1, w1), (LokrW2A, a.clone()), (LokrW2B, b.clone())], 4);
        agrees(Kind::Lokr, &[(LokrW1A, a), (LokrW1B, b), (LokrW2, w2)], 8);
    }
}
