//! LoHa and LoKr as plain LoRA, exactly, convolutions and Tucker cores included.
//!
//! LoHa: (w1_a w1_b) * (w2_a w2_b) = up down, where column (p, q) of `up` is the product of column p of w1_a and column
//! q of w2_a, and row (p, q) of `down` that of row p of w1_b and row q of w2_b. LoKr: kron(p1 q1, p2 q2) =
//! kron(p1, p2) kron(q1, q2), where a factor that is stored whole is itself times the identity on its shorter side.
//! (Mixed-product identities; the formulas of the deltas are those of LyCORIS, `lycoris/functional`.)

use std::collections::BTreeMap;

use super::module::refuse;
use super::{Kind, Module, Refusal, Slot};
use crate::cast::common_dtype;
use crate::dtype::Dtype;
use crate::linalg::{Matrix, svd};
use crate::tensor::{Pairing, Tensor};

/// Stored factors up to this size are searched for ranks that they do not have, wherever a plain form is made. Larger
/// ones only where that was asked for.
const SMALL: usize = 64;

impl Module {
    /// The same delta as a plain LoRA of the rank that its factors give, if that is at most `max_rank`. Every element
    /// of a factor is one product of two stored numbers, rounded once. What is plain already comes back as it is, a
    /// Tucker core is multiplied into its factor.
    pub fn expanded(&self, max_rank: usize) -> Result<Module, Refusal> {
        self.plain(max_rank, SMALL)
    }

    /// The same, with the lowest rank that is exact: both Kronecker factors are searched for missing ranks by their
    /// singular values, which costs the cube of their shorter sides. Numbers of a factor that has fewer ranks than it
    /// could have are computed in float64 and rounded once in the product.
    pub fn expanded_fully(&self) -> Result<Module, Refusal> {
        self.plain(usize::MAX, usize::MAX)
    }

    fn plain(&self, max_rank: usize, searched: usize) -> Result<Module, Refusal> {
        if !matches!(self.kind, Kind::Loha | Kind::Lokr) {
            return Ok(if self.kind == Kind::Lora { self.flattened() } else { self.clone() });
        }
        if self.is_dora() {
            return refuse("is DoRA, which needs the base weights");
        }
        let flat = self.flattened();
        let missing = || Refusal("lacks a factor".to_owned());
        let (up, down) = match self.kind {
            Kind::Loha => flat.hadamard(max_rank).ok_or_else(missing)??,
            _ => flat.kronecker(max_rank, searched).ok_or_else(missing)??,
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

    /// The widest type among the factors.
    pub fn factor_dtype(&self) -> Dtype {
        let factors = self.tensors.iter().filter(|(slot, _)| slot.kind() == Some(self.kind));
        factors.map(|(_, t)| t.dtype()).reduce(common_dtype).unwrap_or(Dtype::F32)
    }

    /// Down in the shape of the convolution that its module is, if it is one.
    pub fn kernel_shaped(&self, down: Tensor) -> Tensor {
        let kernel = self.kernel();
        let size: usize = kernel.iter().product();
        if kernel.is_empty() || size == 0 || !down.cols().is_multiple_of(size) {
            return down;
        }
        let shape = [&[down.rows(), down.cols() / size], kernel].concat();
        down.reshaped(shape)
    }

    /// Of a LoHa without cores: up (out, rank^2) and down (rank^2, in).
    pub fn khatri_rao(&self) -> Option<(Tensor, Tensor)> {
        let [w1a, w1b] = [self.get(Slot::HadaW1A)?, self.get(Slot::HadaW1B)?];
        let [w2a, w2b] = [self.get(Slot::HadaW2A)?, self.get(Slot::HadaW2B)?];
        let up = Tensor::product(w1a, w2a, Pairing::Same, Pairing::Cross);
        Some((up, self.kernel_shaped(Tensor::product(w1b, w2b, Pairing::Cross, Pairing::Same))))
    }

    fn hadamard(&self, max_rank: usize) -> Option<Result<(Tensor, Tensor), Refusal>> {
        let (up, down) = self.khatri_rao()?;
        Some(self.within(down.rows(), max_rank).map(|()| (up, down)))
    }

    fn kronecker(&self, max_rank: usize, searched: usize) -> Option<Result<(Tensor, Tensor), Refusal>> {
        let (p1, q1) = self.factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B, searched)?;
        let (p2, q2) = self.factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B, searched)?;
        let dtype = self.factor_dtype();
        Some(self.within(q1.rows() * q2.rows(), max_rank).map(|()| {
            let kron = |a: &Tensor, b: &Tensor| Tensor::product(a, b, Pairing::Cross, Pairing::Cross).cast(dtype);
            (kron(&p1, &p2), self.kernel_shaped(kron(&q1, &q2)))
        }))
    }

    /// A Kronecker factor as a product: as it is stored, or with the identity on its shorter side, or of its singular
    /// vectors where it has fewer ranks than that. A factor of zeros keeps one.
    fn factor(&self, whole: Slot, left: Slot, right: Slot, searched: usize) -> Option<(Tensor, Tensor)> {
        let Some(w) = self.get(whole) else {
            return Some((self.get(left)?.clone(), self.get(right)?.clone()));
        };
        let short = w.rows().min(w.cols());
        if short > 1
            && short <= searched
            && let Some(found) = svd(&w.to_matrix())
        {
            let rank = numeric_rank(&found.s, w.rows().max(w.cols())).max(1);
            if rank < short {
                let roots: Vec<f64> = found.s[..rank].iter().map(|s| s.sqrt()).collect();
                let side = |m: &Matrix| m.first_cols(rank).scaled_cols(&roots);
                let (p, q) = (side(&found.u), side(&found.v).transposed());
                return Some((Tensor::of_matrix(&p, Dtype::F64), Tensor::of_matrix(&q, Dtype::F64)));
            }
        }
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
            "is {}, whose exact plain form has rank {rank}; `--max-rank {rank}` accepts it (the limit is {max_rank}), \
             `lorafmt expand --rank N` takes the best of rank N",
            self.kind.name()
        ))
    }
}

/// How many singular values are more than rounding of the first.
fn numeric_rank(s: &[f64], side: usize) -> usize {
    let floor = s.first().map_or(0.0, |first| first * f64::EPSILON * side.max(8) as f64);
    s.iter().filter(|s| **s > floor).count()
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
