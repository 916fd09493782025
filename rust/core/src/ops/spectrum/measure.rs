//! The singular values of a module's delta, by the shortest exact way that its kind offers.

use super::Status;
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{tall_singular_values, thin_svd};
use crate::ops::delta::shape;
use crate::ops::factors::{Downs, Ups, factors};
use crate::ops::norm::{KronFactor, SIDE, kronecker, norm_squared, plain, square};
use crate::tensor::Tensor;

/// The highest rank to which a LoHa is expanded. Above it only the norm is told.
const MAX_RANK: usize = 512;

/// The longest shorter side of a matrix (a stored difference, a factor of a LoKr) that is decomposed.
const MAX_SIDE: usize = 1024;

/// What was found of a module. Norms are Frobenius norms and include the scale.
pub(super) struct Measured {
    pub(super) status: Status,
    pub(super) norm: Option<f64>,
    /// Singular values, largest first.
    pub(super) values: Option<Vec<f64>>,
    /// The rank of the factors, which the values cannot exceed.
    pub(super) limit: usize,
    pub(super) vector_norm: Option<f64>,
    pub(super) note: Option<&'static str>,
}

/// Vectors that are added to a parameter.
const VECTORS: [Slot; 3] = [Slot::DiffB, Slot::WNorm, Slot::BNorm];

pub(super) fn measure(module: &Module) -> Measured {
    let module = &module.tightened();
    let vectors: Vec<&Tensor> =
        VECTORS.iter().filter_map(|slot| module.get(*slot)).chain(difference_of_vector(module)).collect();
    let vector_norm = (!vectors.is_empty()).then(|| vectors.iter().map(|t| square(&t.to_f64())).sum::<f64>().sqrt());
    let mut out = match module.kind {
        Kind::Full if difference_of_vector(module).is_some() => without_matrix(None),
        Kind::Bias | Kind::Norm => without_matrix(None),
        Kind::Set => without_matrix(Some("replaces the parameter; not a difference")),
        _ => matrix(module),
    };
    out.vector_norm = vector_norm;
    // What no number above has seen.
    let unseen = |slot: &Slot| out.status == Status::Unmeasured || SIDE.contains(slot) || *slot == Slot::Set;
    let side = module.tensors.iter().filter(|(slot, _)| unseen(slot)).map(|(_, tensor)| tensor);
    let bad = |x: f64| !x.is_finite();
    let broken = side.flat_map(Tensor::to_f64).any(bad) || vector_norm.is_some_and(bad) || out.norm.is_some_and(bad);
    if broken {
        return Measured { status: Status::NotFinite, norm: None, values: None, vector_norm: None, ..out };
    }
    // A magnitude acts by itself, and so does a parameter that is replaced.
    let idle = |norm: Option<f64>| norm.is_none_or(|n| n == 0.0);
    let acts = module.is_dora() || module.kind == Kind::Set || out.status == Status::Unmeasured;
    if !acts && idle(out.norm) && idle(vector_norm) {
        out.status = Status::Dead;
    }
    out
}

/// The stored difference, where it is one of a vector.
fn difference_of_vector(module: &Module) -> Option<&Tensor> {
    module.get(Slot::Diff).filter(|t| t.shape().len() < 2)
}

fn without_matrix(note: Option<&'static str>) -> Measured {
    Measured { status: Status::Ok, norm: None, values: None, limit: 0, vector_norm: None, note }
}

/// The delta of a weight.
fn matrix(module: &Module) -> Measured {
    let Some((m, n)) = shape(module) else {
        let note = Some("has no difference of its own without the base weights");
        return Measured { status: Status::Unmeasured, ..without_matrix(note) };
    };
    let note = module.is_dora().then_some("of the direction alone: the DoRA magnitude needs the base weights");
    match values(module, m.min(n)) {
        Values::Found(values, limit) => {
            let scaled: Vec<f64> = values.into_iter().map(|s| s * module.scale.abs()).filter(|s| *s != 0.0).collect();
            let norm = scaled.iter().rev().map(|s| s * s).sum::<f64>().sqrt();
            Measured { norm: Some(norm), values: Some(scaled), limit, ..without_matrix(note) }
        }
        Values::NotFinite => Measured { norm: Some(f64::NAN), ..without_matrix(note) },
        Values::TooLarge => {
            let norm = norm_squared(module).map(f64::sqrt);
            let note = note.or(Some("only the norm: too large to be decomposed"));
            let status = if norm.is_some() { Status::NormOnly } else { Status::Unmeasured };
            Measured { status, norm, ..without_matrix(note) }
        }
    }
}

enum Values {
    /// Without the scale, and the rank that they cannot exceed.
    Found(Vec<f64>, usize),
    NotFinite,
    TooLarge,
}

impl Values {
    fn of(values: Option<Vec<f64>>, limit: usize) -> Self {
        values.map_or(Values::NotFinite, |v| Values::Found(v, limit))
    }
}

fn values(module: &Module, side: usize) -> Values {
    if let Some([outer, inner]) = kronecker(module) {
        return kronecker_values(&outer, &inner);
    }
    if let Some(diff) = module.get(Slot::Diff).filter(|_| module.kind == Kind::Full) {
        return whole(diff);
    }
    let Some(plain) = plain(module, MAX_RANK) else { return Values::TooLarge };
    match factors(&plain) {
        Some((up, down)) => product(up, down, side),
        None => Values::TooLarge,
    }
}

fn product(up: &Tensor, down: &Tensor, side: usize) -> Values {
    Values::of(thin_svd(&Ups(up), &Downs(down)).map(|thin| thin.s), down.rows().min(side))
}

/// The singular values of a matrix that is stored, through the Gram matrix of its shorter side.
fn whole(tensor: &Tensor) -> Values {
    let (m, n) = (tensor.rows(), tensor.cols());
    match m.min(n) {
        side if side > MAX_SIDE => Values::TooLarge,
        side if m < n => Values::of(tall_singular_values(&Downs(tensor)), side),
        side => Values::of(tall_singular_values(&Ups(tensor)), side),
    }
}

/// The singular values of kron(a, b) are all products of one of a and one of b (Van Loan 2000, "The ubiquitous
/// Kronecker product").
fn kronecker_values(a: &KronFactor<'_>, b: &KronFactor<'_>) -> Values {
    let of = |factor: &KronFactor<'_>| match factor {
        KronFactor::Whole(tensor) => whole(tensor),
        KronFactor::Product(left, right) => product(left, right, left.rows().min(right.cols())),
    };
    match (of(a), of(b)) {
        (Values::Found(x, p), Values::Found(y, q)) => {
            let mut all: Vec<f64> = x.iter().flat_map(|s| y.iter().map(move |t| s * t)).collect();
            all.sort_by(|s, t| t.total_cmp(s));
            Values::Found(all, p * q)
        }
        (Values::NotFinite, _) | (_, Values::NotFinite) => Values::NotFinite,
        _ => Values::TooLarge,
    }
}
