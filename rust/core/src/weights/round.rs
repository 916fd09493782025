//! Float64 into an element type, rounded once: to the nearest, or up and down by chance.

use crate::dtype::{Dtype, odd_f32, round_bf16, round_f16};
use crate::random::Counter;

/// How numbers are rounded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rounding<'a> {
    /// To the nearest, ties to even.
    Nearest,
    /// Up with the probability of what is lost by rounding down: right on average. Number i of the stream decides
    /// element i.
    Stochastic(&'a Counter),
}

/// Bits of a small floating type: mantissa, least exponent, the largest code of a finite number, and the one above it.
struct Format {
    mantissa: u32,
    least: i32,
    largest: u32,
    above: u32,
    sign: u32,
}

impl Format {
    fn of(dtype: Dtype) -> Option<Self> {
        let (mantissa, least, largest, above, sign) = match dtype {
            Dtype::BF16 => (7, -126, 0x7f7f, 0x7f80, 0x8000),
            Dtype::F16 => (10, -14, 0x7bff, 0x7c00, 0x8000),
            // FP8 stays finite: what is out of range becomes the largest number.
            Dtype::F8E4M3 => (3, -6, 0x7e, 0x7e, 0x80),
            Dtype::F8E5M2 => (2, -14, 0x7b, 0x7b, 0x80),
            _ => return None,
        };
        Some(Self { mantissa, least, largest, above, sign })
    }

    /// The code of a number, and whether it was out of range. `up` decides on what lies between two codes: given the
    /// floor and the fraction above it, both in units of the last place.
    fn code(&self, value: f64, up: impl FnOnce(f64, f64) -> bool) -> (u32, bool) {
        let sign = if value.is_sign_negative() { self.sign } else { 0 };
        if value.is_nan() {
            // All ones is NaN in every one of these types.
            return (sign | (self.sign - 1), false);
        }
        let size = value.abs();
        let exponent = (((size.to_bits() >> 52) as i32) - 1023).max(self.least);
        if exponent > 200 {
            return (sign | self.above, true);
        }
        // A power of two, so the product is exact.
        let places = size * f64::from_bits(((1023 + self.mantissa as i32 - exponent) as u64) << 52);
        let floor = places.floor();
        let count = floor as u32 + u32::from(up(floor, places - floor));
        // A carry out of the mantissa goes into the exponent by itself; below the least exponent it has nothing to add.
        let code = (((exponent - self.least + 1) as u32) << self.mantissa) + count - (1 << self.mantissa);
        if code > self.largest { (sign | self.above, true) } else { (sign | code, false) }
    }
}

fn nearest_even(floor: f64, fraction: f64) -> bool {
    fraction > 0.5 || (fraction == 0.5 && floor % 2.0 == 1.0)
}

/// Stores numbers as `dtype`; `first` is the index of the first in its tensor. Returns how many finite numbers were out
/// of range: they became infinite, in FP8 the largest number.
#[inline(always)]
pub(crate) fn store(values: &[f64], dtype: Dtype, rounding: Rounding<'_>, first: u64, out: &mut [u8]) -> usize {
    if let (Rounding::Stochastic(stream), Some(format)) = (rounding, Format::of(dtype)) {
        return coded(values, &format, out, |i, v| {
            format.code(v, |_, fraction| stream.uniform(first + i as u64) < fraction)
        });
    }
    match dtype {
        Dtype::BF16 => {
            let chunks = out.as_chunks_mut::<2>().0.chunks_mut(CHUNK).zip(values.chunks(CHUNK));
            chunks.map(|(out, values)| if quick_bf16(values, out) { 0 } else { each_bf16(values, out) }).sum()
        }
        Dtype::F16 => {
            let mut outside = 0;
            for (o, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                let rounded = round_f16(*v);
                outside += usize::from(rounded.is_infinite() & v.is_finite());
                *o = rounded.to_le_bytes();
            }
            outside
        }
        Dtype::F32 => {
            let mut outside = 0;
            for (o, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                let rounded = *v as f32;
                outside += usize::from(rounded.is_infinite() & v.is_finite());
                *o = rounded.to_le_bytes();
            }
            outside
        }
        Dtype::F64 => {
            out.as_chunks_mut::<8>().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
            0
        }
        other => {
            let format = Format::of(other).expect("only floating tensors are changed");
            coded(values, &format, out, |_, v| format.code(v, nearest_even))
        }
    }
}

/// Numbers that are rounded at a time where none of them is special.
const CHUNK: usize = 256;

/// Rounds to the nearest in loops without branches, so that they become vector code. Returns false if there are
/// infinities or NaN, before or after: then the result is not good.
#[inline(always)]
fn quick_bf16(values: &[f64], out: &mut [[u8; 2]]) -> bool {
    const INFINITE: u32 = 0x7f80_0000;
    let mut special = 0;
    let mut codes = [0u32; CHUNK];
    for (code, value) in codes.iter_mut().zip(values) {
        // As `round_bf16(odd_f32(value))`, in integers of one width.
        let near = *value as f32;
        let (back, bits) = (f64::from(near), near.to_bits());
        let short = u32::from(back.abs() < value.abs());
        let inexact = u32::from(back != *value) & !bits & 1;
        let odd = bits.wrapping_add(inexact.wrapping_mul(short.wrapping_mul(2).wrapping_sub(1)));
        let rounded = odd.wrapping_add(0x7fff + ((odd >> 16) & 1));
        special |= u32::from(bits & INFINITE == INFINITE) | u32::from(rounded & INFINITE == INFINITE);
        *code = rounded >> 16;
    }
    out.iter_mut().zip(&codes).for_each(|(o, code)| *o = (*code as u16).to_le_bytes());
    special == 0
}

/// The bfloat16 next to a number, and whether that is finite and became infinite.
pub(crate) fn bf16_of(value: f64) -> (u16, bool) {
    let code = round_bf16(odd_f32(value));
    (code, (code & 0x7fff == 0x7f80) & value.is_finite())
}

/// The same one by one. Returns how many finite numbers became infinite.
fn each_bf16(values: &[f64], out: &mut [[u8; 2]]) -> usize {
    let mut outside = 0;
    for (o, v) in out.iter_mut().zip(values) {
        let (code, beyond) = bf16_of(*v);
        outside += usize::from(beyond);
        *o = code.to_le_bytes();
    }
    outside
}

fn coded(values: &[f64], format: &Format, out: &mut [u8], code: impl Fn(usize, f64) -> (u32, bool)) -> usize {
    let size = if format.sign == 0x80 { 1 } else { 2 };
    let mut outside = 0;
    for (i, (o, v)) in out.chunks_exact_mut(size).zip(values).enumerate() {
        let (bits, beyond) = code(i, *v);
        outside += usize::from(beyond && v.is_finite());
        o.copy_from_slice(&bits.to_le_bytes()[..size]);
    }
    outside
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::dtype::read_f64;

    fn codes(dtype: Dtype) -> Vec<(u32, f64)> {
        let size = dtype.size();
        let read = |code: u32| read_f64(dtype, &code.to_le_bytes()[..size]);
        let all = 0..1u32 << (8 * size);
        all.map(|code| (code, read(code))).filter(|(_, v)| v.is_finite()).collect()
    }

    fn one(dtype: Dtype, value: f64, rounding: Rounding<'_>) -> (f64, usize) {
        let mut out = vec![0; dtype.size()];
        let outside = store(&[value], dtype, rounding, 0, &mut out);
        (read_f64(dtype, &out), outside)
    }

    /// Every number, every midpoint, and the float64 just beside each midpoint goes where the definition says.
    #[test]
    fn nearest_is_nearest_in_every_type() {
        for dtype in [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::BF16, Dtype::F16] {
            let mut positive: Vec<(u32, f64)> =
                codes(dtype).into_iter().filter(|(_, v)| *v >= 0.0 && v.is_sign_positive()).collect();
            positive.sort_by(|a, b| a.1.total_cmp(&b.1));
            for pair in positive.windows(2) {
                let [(low_code, low), (_, high)] = [pair[0], pair[1]];
                let middle = (low + high) / 2.0;
                let even = if low_code % 2 == 0 { low } else { high };
                for (value, want) in
                    [(low, low), (high, high), (middle, even), (middle.next_down(), low), (middle.next_up(), high)]
                {
                    assert_eq!(one(dtype, value, Rounding::Nearest), (want, 0), "{dtype:?} {value:e}");
                    assert_eq!(one(dtype, -value, Rounding::Nearest).0, -want, "{dtype:?} -{value:e}");
                }
            }
        }
    }

    #[test]
    fn out_of_range() {
        assert_eq!(one(Dtype::F8E4M3, 1e9, Rounding::Nearest), (448.0, 1));
        assert_eq!(one(Dtype::F8E5M2, -1e300, Rounding::Nearest), (-57344.0, 1));
        assert_eq!(one(Dtype::F8E5M2, f64::INFINITY, Rounding::Nearest), (57344.0, 0));
        assert_eq!(one(Dtype::BF16, 1e39, Rounding::Nearest), (f64::INFINITY, 1));
        assert_eq!(one(Dtype::F16, 65520.0, Rounding::Nearest), (f64::INFINITY, 1));
        let counter = Counter::new(1, "x");
        for dtype in [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::BF16, Dtype::F16, Dtype::F32] {
            assert!(one(dtype, f64::NAN, Rounding::Nearest).0.is_nan(), "{dtype:?}");
            assert!(one(dtype, f64::NAN, Rounding::Stochastic(&counter)).0.is_nan(), "{dtype:?}");
        }
    }

    #[test]
    fn special_numbers_among_many_spoil_none_of_them() {
        let special = [f64::NAN, -f64::INFINITY, 1e39, f64::from_bits(u64::MAX), 3.4e38];
        let mut values: Vec<f64> = (0..3 * CHUNK + 7).map(|i| (i as f64 - 300.0) * 1.000_001e-3).collect();
        special.iter().enumerate().for_each(|(i, v)| values[CHUNK + 17 * i] = *v);
        let mut out = vec![0; 2 * values.len()];
        let outside = store(&values, Dtype::BF16, Rounding::Nearest, 0, &mut out);
        let mut alone = 0;
        for (value, bytes) in values.iter().zip(out.as_chunks::<2>().0) {
            let (want, beyond) = one(Dtype::BF16, *value, Rounding::Nearest);
            let have = read_f64(Dtype::BF16, bytes);
            assert!(have == want || (have.is_nan() && want.is_nan()), "{value:e}: {have:e} {want:e}");
            alone += beyond;
        }
        assert_eq!((outside, alone), (2, 2));
    }

    #[test]
    fn chance_is_right_on_average_and_repeats() {
        let counter = Counter::new(3, "w");
        let value = 1.0 + 0.3 / 128.0;
        let n = 20_000;
        let draw = |first: u64| {
            let mut out = vec![0; 2 * n];
            store(&vec![value; n], Dtype::BF16, Rounding::Stochastic(&counter), first, &mut out);
            out
        };
        let all = draw(0);
        let values: Vec<f64> = all.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect();
        assert!(values.iter().all(|v| *v == 1.0 || *v == 1.0 + 1.0 / 128.0));
        let mean = values.iter().sum::<f64>() / n as f64;
        assert!((mean - value).abs() < 5.0 * (0.3f64 * 0.7 / n as f64).sqrt() / 128.0, "{mean}");
        assert_eq!(all[2000..], draw(1000)[..2 * n - 2000]);
        assert_eq!(one(Dtype::F8E4M3, 1.25, Rounding::Stochastic(&counter)).0, 1.25);
    }
}
