//! Elements from one type to another, with a factor, rounded once.

use half::{bf16, f16};

use crate::dtype::{Dtype, f8e4m3_to_f32, f8e5m2_to_f32, read_f64, round_bf16};

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

/// `target = round(source * scale)`, rounded once from float32 (from float64 where either side is). Returns whether a finite element became infinite.
pub(crate) fn convert(from: Dtype, source: &[u8], scale: f64, to: Dtype, target: &mut [u8]) -> bool {
    if from == to && scale == 1.0 {
        target.copy_from_slice(source);
        return false;
    }
    let s = scale as f32;
    match (from, to) {
        (Dtype::BF16, Dtype::BF16) => {
            let mut overflow = false;
            for (o, i) in target.as_chunks_mut::<2>().0.iter_mut().zip(source.as_chunks::<2>().0) {
                let value = f32::from_bits(u32::from(u16::from_le_bytes(*i)) << 16);
                let rounded = round_bf16(value * s);
                overflow |= (rounded & 0x7fff) == 0x7f80 && value.is_finite();
                *o = rounded.to_le_bytes();
            }
            overflow
        }
        (Dtype::F32, Dtype::F32) => {
            let mut overflow = false;
            for (o, i) in target.as_chunks_mut::<4>().0.iter_mut().zip(source.as_chunks::<4>().0) {
                let value = f32::from_le_bytes(*i);
                let scaled = value * s;
                overflow |= scaled.is_infinite() && value.is_finite();
                *o = scaled.to_le_bytes();
            }
            overflow
        }
        // A cast that is no multiplication must not pass integers or float64 through float32.
        _ if from == Dtype::F64 || to == Dtype::F64 || !from.is_float() => convert_f64(from, source, scale, to, target),
        _ => convert_f32(from, source, s, to, target),
    }
}

fn convert_f32(from: Dtype, source: &[u8], scale: f32, to: Dtype, target: &mut [u8]) -> bool {
    let mut overflow = false;
    let pairs = target.chunks_exact_mut(to.size()).zip(source.chunks_exact(from.size()));
    for (o, i) in pairs {
        let value = match from {
            Dtype::F8E4M3 => f8e4m3_to_f32(i[0]),
            Dtype::F8E5M2 => f8e5m2_to_f32(i[0]),
            Dtype::F16 => f16::from_le_bytes([i[0], i[1]]).to_f32(),
            Dtype::BF16 => bf16::from_le_bytes([i[0], i[1]]).to_f32(),
            _ => f32::from_le_bytes([i[0], i[1], i[2], i[3]]),
        };
        overflow |= store(value * scale, to, o) && value.is_finite();
    }
    overflow
}

fn convert_f64(from: Dtype, source: &[u8], scale: f64, to: Dtype, target: &mut [u8]) -> bool {
    let mut overflow = false;
    for (o, i) in target.chunks_exact_mut(to.size()).zip(source.chunks_exact(from.size())) {
        let value = read_f64(from, i);
        let scaled = value * scale;
        overflow |= value.is_finite()
            && match to {
                Dtype::F64 => {
                    o.copy_from_slice(&scaled.to_le_bytes());
                    scaled.is_infinite()
                }
                // Straight from float64, so that there is one rounding.
                Dtype::F16 => {
                    let rounded = f16::from_f64(scaled);
                    o.copy_from_slice(&rounded.to_le_bytes());
                    rounded.is_infinite()
                }
                Dtype::BF16 => {
                    let rounded = bf16::from_f64(scaled);
                    o.copy_from_slice(&rounded.to_le_bytes());
                    rounded.is_infinite()
                }
                _ => store(scaled as f32, to, o),
            };
    }
    overflow
}

/// Rounds and stores; returns whether the stored value is infinite.
fn store(value: f32, to: Dtype, out: &mut [u8]) -> bool {
    match to {
        Dtype::F16 => {
            let rounded = f16::from_f32(value);
            out.copy_from_slice(&rounded.to_le_bytes());
            rounded.is_infinite()
        }
        Dtype::BF16 => {
            let rounded = round_bf16(value);
            out.copy_from_slice(&rounded.to_le_bytes());
            rounded & 0x7fff == 0x7f80
        }
        Dtype::F32 => {
            out.copy_from_slice(&value.to_le_bytes());
            value.is_infinite()
        }
        other => unreachable!("no arithmetic is ever planned into {}", other.name()),
    }
}
