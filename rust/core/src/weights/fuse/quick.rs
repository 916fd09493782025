//! bfloat16 rows plus low-rank products, rounded once: in float32 where that decides, else in float64.
//!
//! The sum of a number and its change is computed in float32, and with it an interval that the float64 sum lies in
//! (see [`crate::linalg::Blocks`] for the bound). Rounding is monotone, so if both ends of the interval are rounded to
//! the same number, so is the float64 sum. Where they are not, or are no finite numbers, the element is computed anew
//! in float64: about one in a thousand. What is stored is thus the rounded float64 sum, on every processor.

// Loops go by index: iterators are not always inlined into functions for another processor than the oldest.
#![allow(clippy::needless_range_loop)]

use super::work::Measure;
use crate::linalg::{Blocks, Matrix, Panels, TALL, WIDE, multiply};
use crate::simd::{Simd, WithSimd};
use crate::weights::round::bf16_of;

/// Columns whose changes are held at a time: they stay in the first-level cache.
const CHUNK: usize = 8 * WIDE;

/// Bytes that memory is read by.
const LINE: usize = 64;

/// Elements that are rounded at a time, in loops of this very length.
const GROUP: usize = 64;

/// The share of a float32 sum that is taken for the rounding of it, and of the ends of the interval: half a unit in the
/// last place each, times two.
const SUM: f32 = 2.0 * f32::EPSILON;

/// Covers what is lost where products and bounds underflow.
const LEAST: f32 = f32::MIN_POSITIVE;

/// The bits of an exponent that only infinities and NaN have.
const SPECIAL: u32 = 0x7f80_0000;

/// Products whose elements are at most this large are computed in float32, and no smaller ones than the next: their
/// squares are added up there.
const LARGEST: f64 = (1u64 << 40) as f64;
const SMALLEST: f64 = 1.0 / LARGEST;

/// Set in a code that is to be computed in float64.
const UNSURE: u32 = 1 << 31;

/// One product: `scale * up @ down`.
pub(super) struct Part<'a> {
    scale: f64,
    up: Matrix,
    blocks: Blocks,
    down: &'a Panels,
}

impl<'a> Part<'a> {
    /// Some rows of a product of which `all` terms are added up.
    pub(super) fn new(scale: f64, up: Matrix, down: &'a Panels, all: usize) -> Self {
        Self { scale, blocks: Blocks::new(scale, &up, all), up, down }
    }

    /// Whether the squares of the sum's elements stay within the range of float32.
    pub(super) fn in_range(parts: &[Self]) -> bool {
        let largest = parts.iter().map(|part| part.blocks.largest() * part.down.largest()).sum();
        (SMALLEST..=LARGEST).contains(&largest)
    }

    /// An element in float64.
    fn element(&self, row: usize, col: usize) -> f64 {
        let (up, down) = (self.up.row(row), self.down.panel(col / WIDE));
        let ((up, up_rest), (down, down_rest)) = (up.as_chunks::<4>(), down.as_chunks::<4>());
        let col = col % WIDE;
        // Four sums, so that one addition need not wait for the last.
        let mut sums = [0.0; 4];
        for k in 0..up.len().min(down.len()) {
            for lane in 0..4 {
                sums[lane] += up[k][lane] * f64::from(down[k][lane][col]);
            }
        }
        for k in 0..up_rest.len().min(down_rest.len()) {
            sums[0] += up_rest[k] * f64::from(down_rest[k][col]);
        }
        self.scale * ((sums[0] + sums[1]) + (sums[2] + sums[3]))
    }
}

/// Some rows of a tensor.
pub(super) struct Rows<'a> {
    pub(super) parts: &'a [Part<'a>],
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// What is there, (rows, cols) bfloat16.
    pub(super) base: &'a [u8],
    /// What is to be there.
    pub(super) out: &'a mut [u8],
}

/// What is added to a row, in float32, and the bounds of its errors.
struct Lines {
    changes: [[f32; CHUNK]; TALL],
    bounds: [f32; CHUNK],
}

impl WithSimd for Rows<'_> {
    type Output = Measure;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Measure {
        let mut lines = Lines { changes: [[0.0; CHUNK]; TALL], bounds: [0.0; CHUNK] };
        let mut sums = Sums::default();
        let factors: Vec<_> = self.parts.iter().map(|part| (&part.blocks, part.down)).collect();
        let (base, out) = (self.base.as_chunks::<2>().0, self.out.as_chunks_mut::<2>().0);
        for first in (0..self.rows).step_by(TALL) {
            // From first to last, as the processor foresees it: below, it is read in short pieces of every row.
            for at in (first * self.cols..base.len().min((first + TALL) * self.cols)).step_by(LINE / 2) {
                std::hint::black_box(base[at]);
            }
            for start in (0..self.cols).step_by(CHUNK) {
                let end = self.cols.min(start + CHUNK);
                for at in (start..end).step_by(WIDE) {
                    multiply(simd, &factors, (first / TALL, at / WIDE), &mut lines.changes, at - start);
                }
                for row in first..self.rows.min(first + TALL) {
                    let here = row * self.cols + start..row * self.cols + end;
                    bounds(self.parts, row, start, &mut lines.bounds);
                    let exact = |value: f64, col: usize| {
                        let change = self.parts.iter().fold(0.0, |sum, part| sum + part.element(row, start + col));
                        bf16_of(value + change)
                    };
                    let line = (&lines.changes[row - first], &lines.bounds);
                    sums.line(&base[here.clone()], line, &mut out[here], exact);
                }
            }
        }
        sums.measure()
    }
}

/// The bounds of a row's errors, from a column on.
#[inline(always)]
fn bounds(parts: &[Part<'_>], row: usize, start: usize, bounds: &mut [f32; CHUNK]) {
    for i in 0..parts.len() {
        let (factor, norms) = (parts[i].blocks.bound(row), &parts[i].down.norms()[start..]);
        let count = norms.len().min(CHUNK);
        let (bounds, norms) = (&mut bounds[..count], &norms[..count]);
        if i == 0 {
            for j in 0..count {
                bounds[j] = factor * norms[j];
            }
        } else {
            for j in 0..count {
                bounds[j] += factor * norms[j];
            }
        }
    }
}

/// Sums for the measure, in parts that become vectors.
#[derive(Default)]
struct Sums {
    /// Of the wanted change squared, the stored one times it, and the difference squared.
    parts: [[f64; LANES]; 3],
    outside: usize,
}

/// Parts of each sum.
const LANES: usize = 16;

impl Sums {
    fn measure(&self) -> Measure {
        let [wanted, along, missed] = self.parts.map(|parts| parts.iter().sum());
        Measure { wanted, along, missed, outside: self.outside }
    }

    /// Rounds a part of a row. `exact` is given a base number and its place, and says the code of its sum, and whether
    /// that was out of range.
    #[inline(always)]
    fn line(
        &mut self,
        base: &[[u8; 2]],
        (changes, bounds): (&[f32; CHUNK], &[f32; CHUNK]),
        out: &mut [[u8; 2]],
        exact: impl Fn(f64, usize) -> (u16, bool),
    ) {
        let (changes, bounds) = (changes.as_chunks::<GROUP>().0, bounds.as_chunks::<GROUP>().0);
        let mut sums = [[0.0; LANES]; 3];
        for i in 0..base.len().div_ceil(GROUP) {
            let end = base.len().min((i + 1) * GROUP);
            let (base, out) = (&base[i * GROUP..end], &mut out[i * GROUP..end]);
            let exact = |value: f64, j: usize| exact(value, i * GROUP + j);
            if let Ok(whole) = base.try_into() {
                self.group(whole, (&changes[i], &bounds[i]), &mut sums, out, exact);
            } else {
                let (mut whole, mut padded) = ([[0; 2]; GROUP], [0.0; GROUP]);
                whole[..base.len()].copy_from_slice(base);
                padded[..base.len()].copy_from_slice(&changes[i][..base.len()]);
                self.group(&whole, (&padded, &bounds[i]), &mut sums, out, exact);
            }
        }
        for part in 0..3 {
            for lane in 0..LANES {
                self.parts[part][lane] += f64::from(sums[part][lane]);
            }
        }
    }

    /// Rounds a group, of which as many elements are there as `out` has; the others are zero.
    #[inline(always)]
    fn group(
        &mut self,
        base: &[[u8; 2]; GROUP],
        (changes, bounds): (&[f32; GROUP], &[f32; GROUP]),
        sums: &mut [[f32; LANES]; 3],
        out: &mut [[u8; 2]],
        exact: impl Fn(f64, usize) -> (u16, bool),
    ) {
        let (mut codes, unsure) = rounded(base, changes, bounds);
        codes[out.len()..].fill(0);
        for part in 0..GROUP / LANES {
            if unsure[part] == 0 {
                continue;
            }
            for j in part * LANES..(part + 1) * LANES {
                if codes[j] >= UNSURE {
                    let (code, outside) = exact(f64::from(number(base[j])), j);
                    codes[j] = u32::from(code);
                    self.outside += usize::from(outside);
                }
            }
        }
        add(base, changes, &codes, sums);
        for j in 0..out.len() {
            out[j] = (codes[j] as u16).to_le_bytes();
        }
    }
}

/// Adds a group up for the measure: in float32, as long as it is one line.
#[inline(always)]
fn add(base: &[[u8; 2]; GROUP], changes: &[f32; GROUP], codes: &[u32; GROUP], sums: &mut [[f32; LANES]; 3]) {
    for at in (0..GROUP).step_by(LANES) {
        for lane in 0..LANES {
            let i = at + lane;
            let stored = f32::from_bits(codes[i] << 16) - number(base[i]);
            let missed = stored - changes[i];
            sums[0][lane] += changes[i] * changes[i];
            sums[1][lane] += stored * changes[i];
            sums[2][lane] += missed * missed;
        }
    }
}

#[inline(always)]
fn number(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

#[inline(always)]
fn nearest(bits: u32) -> u32 {
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
}

/// The codes of sums, and for each few of them whether some are unsure.
#[inline(always)]
fn rounded(
    base: &[[u8; 2]; GROUP],
    changes: &[f32; GROUP],
    bounds: &[f32; GROUP],
) -> ([u32; GROUP], [u32; GROUP / LANES]) {
    let (mut codes, mut unsure) = ([0; GROUP], [0; GROUP / LANES]);
    for part in 0..GROUP / LANES {
        for i in part * LANES..(part + 1) * LANES {
            let sum = number(base[i]) + changes[i];
            let reach = bounds[i] + (sum.abs() * SUM + LEAST);
            let (low, high) = ((sum - reach).to_bits(), (sum + reach).to_bits());
            let code = nearest(low);
            // The lower end is special if anything is; the code may be even where it is not.
            let special = (low & SPECIAL == SPECIAL) | ((code << 16) & SPECIAL == SPECIAL);
            codes[i] = code | if special | (code != nearest(high)) { UNSURE } else { 0 };
            unsure[part] |= codes[i] & UNSURE;
        }
    }
    (codes, unsure)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::random::Counter;
    use crate::simd::run;

    /// Rounds to 8 bits (fewer below the least exponent), ties to even, by the definition.
    fn nearest_bf16(value: f64) -> bf16 {
        let exponent = (((value.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(-126);
        if !value.is_finite() || exponent > 127 {
            return bf16::from_f32(value as f32);
        }
        let unit = 2f64.powi(exponent - 7);
        // Both steps are exact, and so is float32, unless the number is out of its range too.
        bf16::from_bits((((value / unit).round_ties_even() * unit) as f32).to_bits().wrapping_shr(16) as u16)
    }

    /// `w + sum scale * up @ down` in float64, rounded once, for numbers of so few bits that float64 holds the sums.
    fn wanted(base: &[bf16], cols: usize, products: &[(f64, Matrix, Matrix)]) -> (Vec<bf16>, Vec<f64>) {
        let change = |at: usize| {
            let (row, col) = (at / cols, at % cols);
            let term = |(scale, up, down): &(f64, Matrix, Matrix)| {
                scale * (0..down.rows()).fold(0.0, |sum, k| sum + up.get(row, k) * down.get(k, col))
            };
            products.iter().fold(0.0, |sum, product| sum + term(product))
        };
        let changes: Vec<f64> = (0..base.len()).map(change).collect();
        (base.iter().zip(&changes).map(|(w, change)| nearest_bf16(w.to_f64() + change)).collect(), changes)
    }

    fn fused(base: &[bf16], cols: usize, products: &[(f64, Matrix, Matrix)]) -> (Vec<bf16>, Measure, bool) {
        let panels: Vec<Panels> = products.iter().map(|(_, _, down)| Panels::new(down).expect("float32")).collect();
        let all = panels.iter().map(Panels::terms).sum();
        let parts = products.iter().zip(&panels);
        let parts: Vec<Part<'_>> =
            parts.map(|((scale, up, _), panels)| Part::new(*scale, up.clone(), panels, all)).collect();
        let bytes: Vec<u8> = base.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut out = vec![0; bytes.len()];
        let rows = Rows { parts: &parts, rows: base.len() / cols, cols, base: &bytes, out: &mut out };
        let measure = run(rows);
        let out = out.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
        (out, measure, Part::in_range(&parts))
    }

    fn same(got: &[bf16], want: &[bf16], of: impl Fn(usize) -> String) {
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{got} {want}: {}", of(i));
        }
    }

    /// Each number becomes the middle above another, and what lies so near beside it that float32 cannot tell them
    /// apart. Among the numbers are zeros of both signs, subnormal ones, the largest, infinities and NaN.
    #[test]
    fn middles_and_what_is_beside_them() {
        let codes: Vec<u16> =
            (0..=0xffff).filter(|code| code % 89 < 2 || code & 0x7f < 2 || code & 0x7f == 0x7f).collect();
        let steps = [0i32, 1, 2, 40, 128, -1, -3, -300, 0x8000];
        let mut cases = Vec::new();
        for (code, step) in codes.iter().flat_map(|c| steps.iter().map(move |s| (*c, *s))) {
            let (base, near) = (bf16::from_bits(code), (i32::from(code) + step).rem_euclid(0x1_0000) as u32);
            let middle = f32::from_bits((near << 16) + 0x8000);
            // Where float32 does not hold the difference, it is another number that is near the middle.
            let change = middle - base.to_f32();
            if change.is_finite() {
                cases.push((base, change, f64::from(middle).abs() * 2f64.powi(-33)));
            }
        }
        assert!(cases.len() > 10_000);
        let sides = Matrix::new(1, 5, vec![0.0, 1.0, -1.0, 0.5, -0.5]);
        let base: Vec<bf16> = cases.iter().flat_map(|(w, ..)| [*w; 5]).collect();
        let up = |f: &dyn Fn(&(bf16, f32, f64)) -> f64| Matrix::new(cases.len(), 1, cases.iter().map(f).collect());
        let products = [
            (1.0, up(&|(_, change, _)| f64::from(*change)), Matrix::new(1, 5, vec![1.0; 5])),
            (1.0, up(&|(_, _, beside)| *beside), sides),
        ];
        let (want, _) = wanted(&base, 5, &products);
        let (got, measure, _) = fused(&base, 5, &products);
        same(&got, &want, |i| format!("{:?} {}", cases[i / 5], i % 5));
        let beyond = base.iter().zip(&want).filter(|(w, v)| w.is_finite() && v.is_infinite()).count();
        assert!(beyond > 0);
        assert_eq!(measure.outside, beyond);
    }

    /// Sizes with remainders of every kind, several products, and zeros.
    #[test]
    fn sums_are_rounded_once_and_measured() {
        let counter = Counter::new(11, "quick");
        let mut next = 0;
        let mut draw = |size: f64| {
            next += 1;
            let value = bf16::from_f64(size * counter.normal(next)).to_f64();
            if next % 50 == 0 { 0.0 } else { value }
        };
        for (rows, cols, ranks) in
            [(13, 1100, vec![3, 5]), (6, 512, vec![16]), (1, 63, vec![1, 2, 4]), (7, 130, vec![33])]
        {
            let base: Vec<bf16> = (0..rows * cols).map(|_| bf16::from_f64(draw(0.02))).collect();
            let factors = |(i, rank): (usize, &usize)| {
                let up = Matrix::from_fn(rows, *rank, |_, _| draw(0.05));
                ([0.75, -1.25, 0.5][i], up, Matrix::from_fn(*rank, cols, |_, _| draw(0.05)))
            };
            let products: Vec<_> = ranks.iter().enumerate().map(factors).collect();
            let (want, changes) = wanted(&base, cols, &products);
            let (got, measure, in_range) = fused(&base, cols, &products);
            same(&got, &want, |i| format!("{rows} {cols} {ranks:?} {i}"));
            let stored = |i: usize| want[i].to_f64() - base[i].to_f64();
            let sum = |f: &dyn Fn(usize) -> f64| (0..base.len()).map(f).sum::<f64>();
            let near = |a: f64, b: f64, share: f64| assert!((a - b).abs() <= share * b.abs(), "{a} {b}");
            near(measure.wanted, sum(&|i| changes[i] * changes[i]), 1e-6);
            near(measure.along, sum(&|i| stored(i) * changes[i]), 1e-6);
            // What is missed is some hundred times smaller than the change, whose float32 error it has.
            near(measure.missed, sum(&|i| (stored(i) - changes[i]).powi(2)), 1e-5);
            assert!(in_range);
        }
    }

    /// What would overflow or vanish in float32 is exact all the same, and is told to be out of range.
    #[test]
    fn factors_out_of_range() {
        let base: Vec<bf16> = (0..64).map(|i| bf16::from_f32(i as f32 - 31.0)).collect();
        for size in [1e30, 1e-30, 1e-38, 0.0] {
            let size = f64::from(size as f32);
            let up = Matrix::from_fn(1, 1, |_, _| size);
            for (scale, other) in [(1.0, size), (1e-40, 1.0), (1e300, 1.0), (f64::NAN, 1.0)] {
                let products =
                    [(scale, up.clone(), Matrix::from_fn(1, 64, |_, j| other * [0.0, 1.0, -1.0, 2.0][j % 4]))];
                let (want, _) = wanted(&base, 64, &products);
                let (got, _, in_range) = fused(&base, 64, &products);
                same(&got, &want, |i| format!("{size} {scale} {other} {i}"));
                assert_eq!(in_range, size > 1.0 && scale == 1e-40, "{size} {scale} {other}");
            }
        }
    }
}
