//! The plain form of one module, whole or cut to a rank.
//!
//! Each kind is decomposed through what it is stored as, never as a dense matrix: a Kronecker product through its two
//! factors, whose singular values multiply (Van Loan 2000, The ubiquitous Kronecker product); a product of thin factors
//! through those; everything else through a randomised range finder that reads it by rows.

use std::convert::Infallible;
use std::ops::Range;

use crate::cast::common_dtype;
use crate::dtype::Dtype;
use crate::kind::{Kind, Module, Refusal, Slot};
use crate::linalg::{Matrix, Sketch, Svd, sketch, svd, thin_svd};
use crate::ops::based::Based;
use crate::ops::factors::{Downs, Ups};
use crate::ops::resize::RankRule;
use crate::ops::{delta_rows, shape};
use crate::tensor::{Derived, Pairing, Tensor};

/// Ranks that are searched at first where only an error was asked for.
const FIRST: usize = 64;

/// Shares of the norm below this are rounding of the sums that errors are found from.
const NOISE: f64 = 1e-14;

/// How modules are made plain.
pub(super) struct Cutter {
    pub(super) rule: Option<RankRule>,
    pub(super) dtype: Option<Dtype>,
    pub(super) seed: u64,
}

/// Why a module was not made plain.
pub(super) enum Trouble {
    Refused(Refusal),
    /// Its exact form has full rank.
    NeedsRule,
    NotFinite,
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        Trouble::Refused(refusal)
    }
}

/// The plain form of a module.
pub(super) struct Cut {
    pub(super) up: Tensor,
    pub(super) down: Tensor,
    pub(super) scale: f64,
    pub(super) alpha: Option<Tensor>,
    /// The rank of the exact form.
    pub(super) rank_before: usize,
    /// Of the whole difference, where it is known.
    pub(super) norm: Option<f64>,
    /// The squared norm of what is lost.
    pub(super) lost: f64,
}

impl Cut {
    pub(super) fn rank_after(&self) -> usize {
        self.down.rows()
    }

    pub(super) fn relative_error(&self) -> f64 {
        match self.norm {
            Some(norm) if norm > 0.0 => self.lost.sqrt() / norm,
            _ => 0.0,
        }
    }
}

impl Cutter {
    /// A module that needs no weight.
    pub(super) fn factored(&self, module: &Module) -> Result<Cut, Trouble> {
        let flat = module.flattened();
        let lacks = || Trouble::Refused(Refusal("lacks a factor".to_owned()));
        let (m, n) = shape(&flat).ok_or_else(lacks)?;
        match (module.kind, self.rule) {
            (Kind::Full, None) => Err(Trouble::NeedsRule),
            (Kind::Full, Some(rule)) => self.searched(&flat, m.min(n), (m, n), rule, |rows| delta(&flat, rows)),
            (Kind::Lora, None) => exact(flat),
            (Kind::Lora, Some(rule)) => {
                let pair = flat.get(Slot::Up).cloned().zip(flat.get(Slot::Down).cloned());
                let (up, down) = pair.ok_or_else(lacks)?;
                match self.thin(&flat, &up, &down, flat.scale, rule)? {
                    Some(cut) => Ok(cut),
                    None => exact(flat),
                }
            }
            (Kind::Lokr, None) => exact(module.expanded_fully()?),
            (Kind::Lokr, Some(rule)) => match self.kronecker(&flat, rule)? {
                Some(cut) => Ok(cut),
                None => exact(module.expanded_fully()?),
            },
            (Kind::Loha, rule) => {
                let (up, down) = flat.khatri_rao().ok_or_else(lacks)?;
                match rule {
                    None if down.rows() <= m.min(n) => exact(module.expanded_fully()?),
                    None => Ok(whole(&flat, (m, n))),
                    Some(rule) if down.rows() < m.min(n) => match self.thin(&flat, &up, &down, flat.scale, rule)? {
                        Some(cut) => Ok(cut),
                        None => exact(module.expanded_fully()?),
                    },
                    Some(rule) => self.searched(&flat, m.min(n), (m, n), rule, |rows| delta(&flat, rows)),
                }
            }
            _ => Err(Trouble::Refused(Refusal(format!("is {} and has no plain form", module.kind.name())))),
        }
    }

    /// A module on its weight.
    pub(super) fn based(&self, module: &Module, based: &Based) -> Result<Cut, Trouble> {
        let (m, n) = based.shape();
        if let Some((up, down, scale)) = based.factors() {
            let found = match self.rule {
                Some(rule) => self.thin(module, &up, &down, scale, rule)?,
                None => None,
            };
            let dtype = self.rounded(module);
            let exact = || Cut {
                rank_before: down.rows(),
                up: up.clone().cast(dtype),
                down: module.kernel_shaped(down.clone().cast(dtype)),
                scale,
                alpha: None,
                norm: None,
                lost: 0.0,
            };
            return Ok(found.unwrap_or_else(exact));
        }
        let Some(rule) = self.rule else { return Err(Trouble::NeedsRule) };
        self.searched(module, m.min(n), (m, n), rule, |rows| based.rows(rows))
    }

    /// The type that computed factors are rounded to.
    fn rounded(&self, module: &Module) -> Dtype {
        let floats = module.tensors.iter().filter(|(s, t)| s.kind() == Some(module.kind) && t.dtype().is_float());
        let own = floats.map(|(_, t)| t.dtype()).reduce(common_dtype).unwrap_or(Dtype::F32);
        match self.dtype {
            Some(dtype) => dtype,
            None if own.is_fp8() => Dtype::BF16,
            None => own,
        }
    }

    /// `scale up down`, cut; `None` if nothing is cut off.
    fn thin(
        &self,
        module: &Module,
        up: &Tensor,
        down: &Tensor,
        scale: f64,
        rule: RankRule,
    ) -> Result<Option<Cut>, Trouble> {
        let thin = thin_svd(&Ups(up), &Downs(down)).ok_or(Trouble::NotFinite)?;
        let rank = rule.rank(&thin.s, 0.0);
        if rank >= down.rows() {
            return Ok(None);
        }
        let (x, y) = thin.truncated(rank.min(thin.s.len()));
        let s: Vec<f64> = thin.s.iter().map(|s| s * scale.abs()).collect();
        let (mut up, mut down) = (up.times(x), down.combined(y));
        if up.cols() == 0 {
            (up, down) = nothing((up.rows(), down.cols()));
        }
        let dtype = self.rounded(module);
        Ok(Some(Cut {
            rank_before: thin.s.len().max(1),
            norm: Some(norm(&s)),
            lost: lost(&s, rank),
            up: up.cast(dtype),
            down: module.kernel_shaped(down.cast(dtype)),
            scale,
            alpha: None,
        }))
    }

    /// A Kronecker product, cut: the largest of all products of a singular value of the one and one of the other.
    /// `None` if nothing is cut off.
    fn kronecker(&self, flat: &Module, rule: RankRule) -> Result<Option<Cut>, Trouble> {
        let outer = factor(flat, Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
        let inner = factor(flat, Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)?;
        let mut pairs: Vec<(f64, usize, usize)> = Vec::with_capacity(outer.s.len() * inner.s.len());
        for (i, x) in outer.s.iter().enumerate() {
            pairs.extend(inner.s.iter().enumerate().map(|(j, y)| (x * y, i, j)));
        }
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        let s: Vec<f64> = pairs.iter().map(|(s, ..)| s * flat.scale.abs()).collect();
        let rank = rule.rank(&s, 0.0);
        if rank >= s.len() && !s.is_empty() {
            return Ok(None);
        }
        let chosen = &pairs[..rank.min(s.len())];
        let dtype = self.rounded(flat);
        // Each vector of the product is the product of two vectors; their shares of the value meet in it.
        let side = |m: &Matrix, at: &dyn Fn(usize) -> (f64, usize)| {
            let picked = Matrix::from_fn(m.rows(), chosen.len(), |i, k| {
                let (s, column) = at(k);
                m.get(i, column) * s.sqrt()
            });
            Tensor::of_matrix(&picked, Dtype::F64)
        };
        let first = |k: usize| (outer.s[chosen[k].1], chosen[k].1);
        let second = |k: usize| (inner.s[chosen[k].2], chosen[k].2);
        let product = |a: &Matrix, b: &Matrix| {
            Tensor::product(&side(a, &first), &side(b, &second), Pairing::Cross, Pairing::Same)
        };
        let (mut up, mut down) = (product(&outer.u, &inner.u), product(&outer.v, &inner.v).transposed());
        if chosen.is_empty() {
            (up, down) = nothing((outer.u.rows() * inner.u.rows(), outer.v.rows() * inner.v.rows()));
        }
        Ok(Some(Cut {
            rank_before: s.len().max(1),
            norm: Some(norm(&s)),
            lost: lost(&s, rank),
            up: up.cast(dtype),
            down: flat.kernel_shaped(down.cast(dtype)),
            scale: flat.scale,
            alpha: None,
        }))
    }

    /// A difference that is only seen row by row.
    fn searched(
        &self,
        module: &Module,
        rank_before: usize,
        (m, n): (usize, usize),
        rule: RankRule,
        rows: impl Fn(Range<usize>) -> Vec<f64>,
    ) -> Result<Cut, Trouble> {
        let side = m.min(n);
        let limit = rule.limit.unwrap_or(side).min(side);
        let mut followed = if rule.criterion.is_some() { limit.min(FIRST) } else { limit };
        loop {
            let how = Sketch { seed: self.seed, ..Sketch::of_rank(followed) };
            let seen = sketch(m, n, how, |r| Ok::<_, Infallible>(rows(r))).unwrap_or_else(|never| match never {});
            let seen = seen.ok_or(Trouble::NotFinite)?;
            let known: f64 = seen.svd.s.iter().map(|s| s * s).sum();
            let rest = (seen.norm2 - known).max(0.0);
            let rest = if seen.svd.s.len() == side || rest <= seen.norm2 * NOISE { 0.0 } else { rest };
            let rank = rule.rank(&seen.svd.s, rest).min(limit);
            if rank <= followed || followed >= limit {
                let rank = rank.min(seen.svd.s.len());
                let lost = seen.svd.s[rank..].iter().rev().map(|s| s * s).sum::<f64>() + rest;
                return Ok(self.of_svd(module, &seen.svd, rank, rank_before, seen.norm2, lost));
            }
            followed = (followed * 2).min(limit);
        }
    }

    fn of_svd(&self, module: &Module, svd: &Svd, rank: usize, rank_before: usize, norm2: f64, lost: f64) -> Cut {
        let roots: Vec<f64> = svd.s[..rank].iter().map(|s| s.sqrt()).collect();
        let side = |m: &Matrix| m.first_cols(rank).scaled_cols(&roots);
        let dtype = self.rounded(module);
        Cut {
            up: Tensor::of_matrix(&side(&svd.u), dtype),
            down: module.kernel_shaped(Tensor::of_matrix(&side(&svd.v).transposed(), dtype)),
            scale: 1.0,
            alpha: None,
            rank_before,
            norm: Some(norm2.sqrt()),
            lost: if lost <= norm2 * NOISE { 0.0 } else { lost },
        }
    }
}

fn delta(module: &Module, rows: Range<usize>) -> Vec<f64> {
    delta_rows(module, rows).expect("a module with a shape has a delta")
}

fn norm(s: &[f64]) -> f64 {
    s.iter().rev().map(|s| s * s).sum::<f64>().sqrt()
}

fn lost(s: &[f64], rank: usize) -> f64 {
    s[rank.min(s.len())..].iter().rev().map(|s| s * s).sum()
}

/// A plain module as it is.
fn exact(module: Module) -> Result<Cut, Trouble> {
    let pair = module.get(Slot::Up).cloned().zip(module.get(Slot::Down).cloned());
    let (up, down) = pair.ok_or(Trouble::Refused(Refusal("lacks a factor".to_owned())))?;
    let rank_before = down.rows();
    Ok(Cut { up, down, scale: module.scale, alpha: module.alpha, rank_before, norm: None, lost: 0.0 })
}

/// One rank of zeros.
fn nothing((m, n): (usize, usize)) -> (Tensor, Tensor) {
    (Tensor::zeros(Dtype::F64, vec![m, 1]), Tensor::zeros(Dtype::F64, vec![1, n]))
}

/// A Kronecker factor, decomposed: as it is stored, or through the two factors that it is stored as.
fn factor(flat: &Module, whole: Slot, left: Slot, right: Slot) -> Result<Svd, Trouble> {
    if let Some(w) = flat.get(whole) {
        let found = svd(&w.to_matrix()).ok_or(Trouble::NotFinite)?;
        let floor = found.s.first().map_or(0.0, |s| s * f64::EPSILON * w.rows().max(w.cols()).max(8) as f64);
        let rank = found.s.iter().filter(|s| **s > floor).count();
        return Ok(Svd { u: found.u.first_cols(rank), v: found.v.first_cols(rank), s: found.s[..rank].to_vec() });
    }
    let pair = flat.get(left).zip(flat.get(right));
    let (b, a) = pair.ok_or(Trouble::Refused(Refusal("lacks a factor".to_owned())))?;
    let thin = thin_svd(&Ups(b), &Downs(a)).ok_or(Trouble::NotFinite)?;
    let inverse: Vec<f64> = thin.s.iter().map(|s| s.recip()).collect();
    let u = b.to_matrix().times(&thin.p).scaled_cols(&inverse);
    let v = a.to_matrix().transpose_times(&thin.q).scaled_cols(&inverse);
    Ok(Svd { u, v, s: thin.s })
}

/// The difference itself times an identity: the exact form of a LoHa with more products of ranks than it has rows or
/// columns.
fn whole(flat: &Module, (m, n): (usize, usize)) -> Cut {
    let dtype = flat.factor_dtype();
    let delta = Tensor::derived(std::sync::Arc::new(Whole { module: flat.clone(), size: (m, n) })).cast(dtype);
    let one = Tensor::constant(Dtype::F32, vec![1, 1], 1f32.to_le_bytes().to_vec());
    let identity = Tensor::block_diagonal(&vec![one; m.min(n)]).cast(dtype);
    let (up, down) = if m < n { (identity, delta) } else { (delta, identity) };
    Cut { up, down: flat.kernel_shaped(down), scale: 1.0, alpha: None, rank_before: m.min(n), norm: None, lost: 0.0 }
}

/// The difference of a module as a tensor.
#[derive(Debug)]
struct Whole {
    module: Module,
    size: (usize, usize),
}

impl Derived for Whole {
    fn parts(&self) -> Vec<&Tensor> {
        self.module.tensors.values().collect()
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        self.size
    }

    fn computes(&self) -> bool {
        true
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> crate::cast::Loss {
        let values = delta(&self.module, rows);
        out.as_chunks_mut::<8>().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
        crate::cast::Loss::default()
    }
}
