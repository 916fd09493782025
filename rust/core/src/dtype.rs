//! Element types of the safetensors format, and exact conversions between the floating ones.

use half::{bf16, f16};

macro_rules! dtypes {
    ($($variant:ident $name:literal $size:literal $float:literal;)*) => {
        /// An element type. The order is that of alignment, as safetensors sorts tensors by it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)]
        pub enum Dtype { $($variant,)* }

        impl Dtype {
            /// Every type that is read.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];
            /// The name in a safetensors header.
            pub fn name(self) -> &'static str { match self { $(Dtype::$variant => $name,)* } }
            /// Bytes of one element.
            pub fn size(self) -> usize { match self { $(Dtype::$variant => $size,)* } }
            /// Whether arithmetic on it is floating.
            pub fn is_float(self) -> bool { match self { $(Dtype::$variant => $float,)* } }
        }
    };
}

dtypes! {
    Bool "BOOL" 1 false;
    U8 "U8" 1 false;
    I8 "I8" 1 false;
    F8E5M2 "F8_E5M2" 1 true;
    F8E4M3 "F8_E4M3" 1 true;
    I16 "I16" 2 false;
    U16 "U16" 2 false;
    F16 "F16" 2 true;
    BF16 "BF16" 2 true;
    I32 "I32" 4 false;
    U32 "U32" 4 false;
    F32 "F32" 4 true;
    F64 "F64" 8 true;
    I64 "I64" 8 false;
    U64 "U64" 8 false;
}

impl Dtype {
    /// The type of that name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|d| d.name() == name)
    }

    /// Largest relative error of rounding a normal number to this type (half a unit in the last place); 0 for integers.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Dtype::F64 => f64::EPSILON / 2.0,
            Dtype::F32 => f64::from(f32::EPSILON) / 2.0,
            Dtype::F16 => 2f64.powi(-11),
            Dtype::BF16 => 2f64.powi(-8),
            Dtype::F8E4M3 => 2f64.powi(-4),
            Dtype::F8E5M2 => 2f64.powi(-3),
            _ => 0.0,
        }
    }

    /// Whether every value of `self` is a value of `other`.
    pub fn fits_in(self, other: Dtype) -> bool {
        use Dtype::{BF16, F8E4M3, F8E5M2, F16, F32, F64};
        self == other
            || matches!((self, other), (F8E4M3 | F8E5M2, BF16 | F16 | F32 | F64) | (F16 | BF16, F32 | F64) | (F32, F64))
    }

    /// Whether this is one of the two 8-bit floating types.
    pub fn is_fp8(self) -> bool {
        matches!(self, Dtype::F8E4M3 | Dtype::F8E5M2)
    }
}

/// Reads one element as float64: exact for every type but 64-bit integers over 2^53.
///
/// `bytes` must hold at least `dtype.size()` bytes.
pub fn read_f64(dtype: Dtype, bytes: &[u8]) -> f64 {
    macro_rules! le {
        ($t:ty) => {{
            let mut raw = [0u8; size_of::<$t>()];
            let n = raw.len();
            raw.copy_from_slice(&bytes[..n]);
            <$t>::from_le_bytes(raw)
        }};
    }
    match dtype {
        Dtype::Bool | Dtype::U8 => f64::from(bytes[0]),
        Dtype::I8 => f64::from(bytes[0] as i8),
        Dtype::F8E4M3 => f64::from(f8e4m3_to_f32(bytes[0])),
        Dtype::F8E5M2 => f64::from(f8e5m2_to_f32(bytes[0])),
        Dtype::I16 => f64::from(le!(i16)),
        Dtype::U16 => f64::from(le!(u16)),
        Dtype::F16 => f64::from(f16::from_bits(le!(u16))),
        Dtype::BF16 => f64::from(bf16::from_bits(le!(u16))),
        Dtype::I32 => f64::from(le!(i32)),
        Dtype::U32 => f64::from(le!(u32)),
        Dtype::F32 => f64::from(le!(f32)),
        Dtype::F64 => le!(f64),
        Dtype::I64 => le!(i64) as f64,
        Dtype::U64 => le!(u64) as f64,
    }
}

/// `float8_e4m3fn`: 4 exponent bits of bias 7, no infinities, NaN is all ones.
pub fn f8e4m3_to_f32(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from((byte >> 3) & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// `float8_e5m2`: the upper byte of a float16.
pub fn f8e5m2_to_f32(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// Rounds to bfloat16, nearest even; NaN stays NaN.
#[inline]
pub fn round_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // Written without a branch in the common path, so that loops over it become vector code.
    let nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
    if nan { ((bits >> 16) | 0x40) as u16 } else { (rounded >> 16) as u16 }
}

/// The float32 beside a float64 whose last bit tells that something was cut off: rounding it further to a type of at
/// most 22 bits gives what rounding the float64 gives (Boldo and Melquiond 2008, "round to odd").
pub(crate) fn odd_f32(value: f64) -> f32 {
    let near = value as f32;
    let (back, bits) = (f64::from(near), near.to_bits());
    // Written without branches, so that loops over it become vector code. NaN keeps being one.
    let inexact = (back != value) & (bits & 1 == 0) & !value.is_nan();
    let towards = if back.abs() < value.abs() { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    f32::from_bits(if inexact { towards } else { bits })
}

/// Rounds to float16, once.
pub(crate) fn round_f16(value: f64) -> f16 {
    f16::from_f32(odd_f32(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for d in Dtype::ALL {
            assert_eq!(Dtype::from_name(d.name()), Some(*d));
        }
    }

    #[test]
    fn fp8_known_values() {
        // From the format's definition (OCP 8-bit floating point): largest, smallest normal, smallest subnormal, NaN.
        assert_eq!(f8e4m3_to_f32(0x7e), 448.0);
        assert_eq!(f8e4m3_to_f32(0x08), 2f32.powi(-6));
        assert_eq!(f8e4m3_to_f32(0x01), 2f32.powi(-9));
        assert_eq!(f8e4m3_to_f32(0xb8), -1.0);
        assert!(f8e4m3_to_f32(0x7f).is_nan());
        assert_eq!(f8e5m2_to_f32(0x7b), 57344.0);
        assert_eq!(f8e5m2_to_f32(0x01), 2f32.powi(-16));
        assert!(f8e5m2_to_f32(0x7c).is_infinite());
    }

    #[test]
    fn every_fp8_value_is_a_bf16_and_f16_value() {
        for byte in 0..=255u8 {
            for value in [f8e4m3_to_f32(byte), f8e5m2_to_f32(byte)] {
                if value.is_nan() {
                    continue;
                }
                assert_eq!(bf16::from_f32(value).to_f32(), value);
                assert_eq!(f16::from_f32(value).to_f32(), value);
            }
        }
    }

    #[test]
    fn bf16_rounding_agrees_with_half() {
        for step in 0..200_000u32 {
            let value = f32::from_bits(step.wrapping_mul(2_654_435_761));
            let ours = round_bf16(value);
            if value.is_nan() {
                assert!(bf16::from_bits(ours).is_nan());
            } else {
                assert_eq!(ours, bf16::from_f32(value).to_bits(), "{value}");
            }
        }
    }

    /// Just above a tie, by less than float32 shows: rounding by way of float32 would go down.
    #[test]
    fn float64_is_rounded_once() {
        let tie = 1.0 + 2f64.powi(-8);
        assert_eq!(round_bf16(odd_f32(tie)), bf16::from_f64(1.0).to_bits());
        assert_eq!(round_bf16(odd_f32(tie.next_up())), bf16::from_f64(1.0 + 2f64.powi(-7)).to_bits());
        let tie = 1.0 + 2f64.powi(-11);
        assert_eq!(round_f16(tie).to_f64(), 1.0);
        assert_eq!(round_f16(tie.next_up()).to_f64(), 1.0 + 2f64.powi(-10));
        assert_eq!(odd_f32(f64::MAX), f32::MAX);
        assert!(odd_f32(f64::NAN).is_nan());
        assert_eq!(odd_f32(-f64::INFINITY), -f32::INFINITY);
        assert_eq!(odd_f32(0.5), 0.5);
    }
}
