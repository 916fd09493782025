//! Elements from one type to another, with a factor, rounded once.

use std::sync::LazyLock;

use half::{bf16, f16};

use crate::dtype::{Dtype, f8e4m3_to_f32, f8e5m2_to_f32, odd_f32, read_f64, round_bf16, round_f16};

/// What happened to values on their way into another type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loss {
    /// A finite value became infinite.
    pub overflow: bool,
    /// A value that is not zero became zero.
    pub underflow: bool,
}

impl std::ops::BitOrAssign for Loss {
    fn bitor_assign(&mut self, other: Self) {
        self.overflow |= other.overflow;
        self.underflow |= other.underflow;
    }
}

impl Loss {
    fn seen(before: f64, after: f64) -> Self {
        Self { overflow: before.is_finite() && after.is_infinite(), underflow: before != 0.0 && after == 0.0 }
    }
}

/// The narrowest type that holds every value of both.
pub(crate) fn common_dtype(a: Dtype, b: Dtype) -> Dtype {
    if a.fits_in(b) {
        b
    } else if b.fits_in(a) {
        a
    } else if a.is_fp8() && b.is_fp8() {
        Dtype::BF16
    } else {
        Dtype::F32
    }
}

/// `target = round(source * scale)`, rounded once from float32 (from float64 where either side is).
pub(crate) fn convert(from: Dtype, source: &[u8], scale: f64, to: Dtype, target: &mut [u8]) -> Loss {
    if from == to && scale == 1.0 {
        target.copy_from_slice(source);
        return Loss::default();
    }
    let mut loss = match (from, to) {
        (Dtype::BF16, Dtype::BF16) => scale_bf16(source, scale as f32, target),
        // A cast that is no multiplication must not pass integers or float64 through float32.
        _ if from == Dtype::F64 || to == Dtype::F64 || !from.is_float() => convert_f64(from, source, scale, to, target),
        _ => convert_f32(from, source, scale as f32, to, target),
    };
    // Zeros that were asked for are no loss.
    loss.underflow &= scale != 0.0;
    loss
}

/// The common case by itself, without a branch in the loop, so that it becomes vector code.
fn scale_bf16(source: &[u8], scale: f32, target: &mut [u8]) -> Loss {
    let mut loss = Loss::default();
    for (o, i) in target.as_chunks_mut::<2>().0.iter_mut().zip(source.as_chunks::<2>().0) {
        let bits = u16::from_le_bytes(*i);
        let rounded = round_bf16(f32::from_bits(u32::from(bits) << 16) * scale);
        loss.overflow |= (rounded & 0x7fff == 0x7f80) & (bits & 0x7f80 != 0x7f80);
        loss.underflow |= (rounded & 0x7fff == 0) & (bits & 0x7fff != 0);
        *o = rounded.to_le_bytes();
    }
    loss
}

fn convert_f32(from: Dtype, source: &[u8], scale: f32, to: Dtype, target: &mut [u8]) -> Loss {
    let mut loss = Loss::default();
    for (o, i) in target.chunks_exact_mut(to.size()).zip(source.chunks_exact(from.size())) {
        let value = match from {
            Dtype::F8E4M3 => f8e4m3_to_f32(i[0]),
            Dtype::F8E5M2 => f8e5m2_to_f32(i[0]),
            Dtype::F16 => f16::from_le_bytes([i[0], i[1]]).to_f32(),
            Dtype::BF16 => bf16::from_le_bytes([i[0], i[1]]).to_f32(),
            _ => f32::from_le_bytes([i[0], i[1], i[2], i[3]]),
        };
        loss |= Loss::seen(f64::from(value), f64::from(store(value * scale, to, o)));
    }
    loss
}

fn convert_f64(from: Dtype, source: &[u8], scale: f64, to: Dtype, target: &mut [u8]) -> Loss {
    let mut loss = Loss::default();
    for (o, i) in target.chunks_exact_mut(to.size()).zip(source.chunks_exact(from.size())) {
        let value = read_f64(from, i);
        let scaled = value * scale;
        let stored = match to {
            Dtype::F64 => {
                o.copy_from_slice(&scaled.to_le_bytes());
                scaled
            }
            // Straight from float64, so that there is one rounding.
            Dtype::F16 => {
                let rounded = round_f16(scaled);
                o.copy_from_slice(&rounded.to_le_bytes());
                rounded.to_f64()
            }
            Dtype::BF16 => {
                let rounded = round_bf16(odd_f32(scaled));
                o.copy_from_slice(&rounded.to_le_bytes());
                bf16::from_bits(rounded).to_f64()
            }
            _ => f64::from(store(scaled as f32, to, o)),
        };
        loss |= Loss::seen(value, stored);
    }
    loss
}

/// Rounds and stores; returns the stored value.
fn store(value: f32, to: Dtype, out: &mut [u8]) -> f32 {
    match to {
        Dtype::F16 => {
            let rounded = f16::from_f32(value);
            out.copy_from_slice(&rounded.to_le_bytes());
            rounded.to_f32()
        }
        Dtype::BF16 => {
            let rounded = round_bf16(value);
            out.copy_from_slice(&rounded.to_le_bytes());
            bf16::from_bits(rounded).to_f32()
        }
        Dtype::F32 => {
            out.copy_from_slice(&value.to_le_bytes());
            value
        }
        other => unreachable!("no arithmetic is ever planned into {}", other.name()),
    }
}

/// Elements as float64, exactly (but for 64-bit integers over 2^53). Common types in loops without branches.
#[inline(always)]
pub(crate) fn load(dtype: Dtype, bytes: &[u8], out: &mut [f64]) {
    static FP8: LazyLock<[[f64; 256]; 2]> = LazyLock::new(|| {
        let table = |one: fn(u8) -> f32| std::array::from_fn(|code| f64::from(one(code as u8)));
        [table(f8e4m3_to_f32), table(f8e5m2_to_f32)]
    });
    match dtype {
        Dtype::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f64::from(f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16));
            }
        }
        Dtype::F16 => {
            out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f64());
        }
        Dtype::F32 => {
            out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = f64::from(f32::from_le_bytes(*b)));
        }
        Dtype::F8E4M3 | Dtype::F8E5M2 => {
            let table = &FP8[usize::from(dtype == Dtype::F8E5M2)];
            out.iter_mut().zip(bytes).for_each(|(o, b)| *o = table[usize::from(*b)]);
        }
        _ => out.iter_mut().zip(bytes.chunks_exact(dtype.size())).for_each(|(o, b)| *o = read_f64(dtype, b)),
    }
}
