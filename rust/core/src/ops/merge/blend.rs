//! The rules, element by element: what is kept of every term, which sign is elected, and what is divided by.
//!
//! Written from the papers and checked against PEFT (`utils/merge_utils.py`) and mergekit (`sparsify.py`,
//! `merge_methods/generalized_task_arithmetic.py`), which differ in the order of weights and election.

use std::ops::Range;

use super::cut::{Cut, tiles};
use super::options::{MergeOptions, Rescale, Rule, Sign, Sparse};
use crate::linalg::{Matrix, Tall};
use crate::random::Counter;

/// Weights that cancel to less than this divide nothing, as in mergekit.
const NO_WEIGHT: f64 = 1e-8;

/// Sums of absolute values below this are not rescaled to, as in mergekit.
const NO_NORM: f64 = 1e-7;

/// One term: its elements, and its weight.
#[derive(Debug, Clone)]
pub(super) struct Part<T> {
    pub(super) matrix: T,
    pub(super) weight: f64,
    /// Its number in the composition.
    pub(super) term: usize,
}

/// Which elements of a term are kept.
#[derive(Debug, Clone)]
enum Mask {
    All,
    Nothing,
    /// Those inside the second cut and outside the first.
    Between(Option<Cut>, Cut),
    /// Each with the same chance.
    Random(Counter, f64),
    /// Each with a chance that grows from the least to the largest of a row: the first one, and what is added to it.
    Ranked(Counter, f64, f64),
}

/// A term with what is kept of it, and how that is enlarged.
#[derive(Debug, Clone)]
struct Sparsified<T> {
    part: Part<T>,
    mask: Mask,
    factor: f64,
}

/// Several matrices of one shape, merged when they are read.
#[derive(Debug, Clone)]
pub(super) struct Blend<T> {
    terms: Vec<Sparsified<T>>,
    rule: Rule,
    election: Option<Sign>,
    normalizes: bool,
    lambda: f64,
}

impl<T: Tall> Blend<T> {
    /// Decides what is kept of every term; reads all of them where that takes a look at all elements. Random choices
    /// are those of the seed, the name, the number of the term and the index of the element.
    pub(super) fn new(parts: Vec<Part<T>>, options: &MergeOptions, name: &str) -> Self {
        let terms = parts.into_iter().map(|part| sparsified(part, options, name)).collect();
        Self {
            terms,
            rule: options.rule(),
            election: options.election(),
            normalizes: options.normalizes(),
            lambda: options.lambda,
        }
    }

    pub(super) fn parts(&self) -> impl Iterator<Item = &T> {
        self.terms.iter().map(|t| &t.part.matrix)
    }

    /// What one element becomes. `values` are those of the terms, sparsified.
    fn merge(&self, values: &[f64]) -> f64 {
        let early = self.rule == Rule::Mergekit;
        let vote = |(x, t): (&f64, &Sparsified<T>)| if early { x * t.part.weight } else { *x };
        let votes = || values.iter().zip(&self.terms).map(vote);
        let elected = self.election.map(|how| {
            let total: f64 = match how {
                Sign::Total => votes().sum(),
                Sign::Frequency => votes().map(sign).sum(),
            };
            if total >= 0.0 { 1.0 } else { -1.0 }
        });
        let (mut sum, mut mass) = (0.0, 0.0);
        for ((x, term), vote) in values.iter().zip(&self.terms).zip(votes()) {
            if elected.is_none_or(|elected| sign(vote) == elected) {
                sum += x * term.part.weight;
                mass += if early { term.part.weight } else { 1.0 };
            }
        }
        if self.normalizes && mass.abs() > NO_WEIGHT {
            sum /= mass;
        }
        sum * self.lambda
    }
}

impl<T: Tall> Tall for Blend<T> {
    fn rows(&self) -> usize {
        self.terms[0].part.matrix.rows()
    }

    fn cols(&self) -> usize {
        self.terms[0].part.matrix.cols()
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        let kept = |term: &Sparsified<T>| {
            let mut values = term.part.matrix.read(rows.clone());
            term.mask.apply(rows.start, &mut values);
            values.data_mut().iter_mut().for_each(|x| *x *= term.factor);
            values
        };
        let terms: Vec<Matrix> = self.terms.iter().map(kept).collect();
        let mut values = vec![0.0; terms.len()];
        let merged = (0..rows.len() * self.cols()).map(|i| {
            values.iter_mut().zip(&terms).for_each(|(v, term)| *v = term.data()[i]);
            self.merge(&values)
        });
        let merged = merged.collect();
        Matrix::new(rows.len(), self.cols(), merged)
    }
}

/// 1, -1, or 0 for zero of either sign.
fn sign(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

fn sparsified<T: Tall>(part: Part<T>, options: &MergeOptions, name: &str) -> Sparsified<T> {
    let density = options.density_of(part.term);
    let mask = mask(&part, density, options, name);
    let factor = match (options.rescaling(), &mask) {
        (Rescale::No, _) | (_, Mask::All | Mask::Nothing) => 1.0,
        (Rescale::Density, _) => density.recip(),
        (Rescale::Norm, mask) => {
            let (before, after) = norms(&part.matrix, mask);
            if before < NO_NORM || after < NO_NORM { 1.0 } else { before / after }
        }
    };
    Sparsified { part, mask, factor }
}

fn mask<T: Tall>(part: &Part<T>, density: f64, options: &MergeOptions, name: &str) -> Mask {
    let sparse = options.sparse();
    let elements = part.matrix.rows() as u64 * part.matrix.cols() as u64;
    // Rounded down, as both PEFT and mergekit do.
    let kept = (density * elements as f64) as u64;
    let stream = || Counter::new(options.seed, &format!("merge {} {name}", part.term));
    match sparse {
        _ if density >= 1.0 => Mask::All,
        Sparse::Nothing => Mask::All,
        _ if density <= 0.0 => Mask::Nothing,
        Sparse::Random => Mask::Random(stream(), density),
        Sparse::Ranked => Mask::Ranked(stream(), density - options.epsilon(), 2.0 * options.epsilon()),
        Sparse::Magnitude | Sparse::Outliers if kept == 0 => Mask::Nothing,
        Sparse::Magnitude => Mask::Between(None, Cut::new(&part.matrix, kept)),
        Sparse::Outliers => {
            // Fewer of the largest are left out where not enough would remain.
            let top = ((options.gamma() * elements as f64) as u64).min(elements - kept);
            let outside = (top > 0).then(|| Cut::new(&part.matrix, top));
            Mask::Between(outside, Cut::new(&part.matrix, top + kept))
        }
    }
}

/// The sums of absolute values of all elements, and of those that are kept.
fn norms(matrix: &dyn Tall, mask: &Mask) -> (f64, f64) {
    let sum = |values: &Matrix| values.data().iter().map(|x| x.abs()).sum::<f64>();
    let (mut before, mut after) = (0.0, 0.0);
    for (rows, mut tile) in tiles(matrix) {
        before += sum(&tile);
        mask.apply(rows.start, &mut tile);
        after += sum(&tile);
    }
    (before, after)
}

impl Mask {
    /// Sets all elements to zero that are not kept; the rows begin at `first` of the matrix.
    fn apply(&self, first: usize, values: &mut Matrix) {
        let cols = values.cols();
        let start = first as u64 * cols as u64;
        match self {
            Mask::All => {}
            Mask::Nothing => values.data_mut().fill(0.0),
            Mask::Between(None, inside) => drop_unless(values, start, |x, i| inside.holds(x, i)),
            Mask::Between(Some(outside), inside) => {
                drop_unless(values, start, |x, i| inside.holds(x, i) && !outside.holds(x, i))
            }
            Mask::Random(stream, density) => drop_unless(values, start, |_, i| stream.uniform(i) < *density),
            Mask::Ranked(stream, least, span) => {
                for (row, line) in values.data_mut().chunks_exact_mut(cols.max(1)).enumerate() {
                    let from = start + (row * cols) as u64;
                    drop_small(line, |j| stream.uniform(from + j as u64), *least, *span);
                }
            }
        }
    }
}

/// Sets elements to zero by value and index.
fn drop_unless(values: &mut Matrix, start: u64, keeps: impl Fn(f64, u64) -> bool) {
    for (i, x) in values.data_mut().iter_mut().enumerate() {
        if !keeps(*x, start + i as u64) {
            *x = 0.0;
        }
    }
}

/// Drops elements of a row: the chance to stay is `least` for the smallest and `least + span` for the largest, evenly
/// spread over the ranks between (Deep et al. 2024, MagPrune).
fn drop_small(line: &mut [f64], draw: impl Fn(usize) -> f64, least: f64, span: f64) {
    let mut order: Vec<usize> = (0..line.len()).collect();
    order.sort_by(|&i, &j| (line[i].abs() as f32).total_cmp(&(line[j].abs() as f32)));
    // A row of one element has no ranks: it stays with the density itself.
    let place = |rank: usize| if line.len() > 1 { rank as f64 / (line.len() - 1) as f64 } else { 0.5 };
    let dropped: Vec<usize> = order
        .iter()
        .enumerate()
        .filter(|(rank, i)| draw(**i) >= least + span * place(*rank))
        .map(|(_, i)| *i)
        .collect();
    dropped.into_iter().for_each(|i| line[i] = 0.0);
}
