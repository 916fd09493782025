//! What numbers were before they were changed a little, in few bits.
//!
//! Bit patterns of floating numbers, brought to an order, are integers; what a fused adapter does to a weight is a few
//! steps on that ladder. The steps are coded as in JPEG-LS (Weinberger, Seroussi and Sapiro 2000): adaptive Golomb-Rice
//! codes, in a context that both sides know, here the exponent of the changed number: the smaller it is, the more
//! steps. Every tile starts anew, so tiles can be coded and decoded side by side.

use crate::dtype::Dtype;

/// Zeros in a row that announce a number written out.
const LIMIT: u32 = 24;

/// Steps are forgotten by half after so many.
const MEMORY: u64 = 64;

/// The bits of an element type.
#[derive(Clone, Copy)]
struct Width {
    bytes: usize,
    bits: u32,
    mantissa: u32,
}

impl Width {
    fn of(dtype: Dtype) -> Self {
        let mantissa = match dtype {
            Dtype::F64 => 52,
            Dtype::F32 => 23,
            Dtype::F16 => 10,
            Dtype::BF16 => 7,
            Dtype::F8E4M3 => 3,
            Dtype::F8E5M2 => 2,
            _ => 8 * dtype.size() as u32 - 1,
        };
        Self { bytes: dtype.size(), bits: 8 * dtype.size() as u32, mantissa }
    }

    fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    fn read(self, bytes: &[u8]) -> u64 {
        let mut raw = [0; 8];
        raw[..self.bytes].copy_from_slice(bytes);
        u64::from_le_bytes(raw)
    }

    /// Bit patterns in the order of the numbers.
    fn ordered(self, bits: u64) -> u64 {
        let top = 1 << (self.bits - 1);
        if bits & top == 0 { bits | top } else { !bits & self.mask() }
    }

    fn unordered(self, rank: u64) -> u64 {
        let top = 1 << (self.bits - 1);
        if rank & top == 0 { !rank & self.mask() } else { rank ^ top }
    }

    fn context(self, bits: u64) -> usize {
        ((bits & (self.mask() >> 1)) >> self.mantissa) as usize
    }

    fn contexts(self) -> usize {
        1 << (self.bits - 1 - self.mantissa)
    }

    /// Steps from the changed number to the original one: 0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ...
    fn steps(self, original: u64, changed: u64) -> u64 {
        let difference = self.ordered(original).wrapping_sub(self.ordered(changed)) << (64 - self.bits);
        let signed = (difference as i64) >> (64 - self.bits);
        ((signed << 1) ^ (signed >> 63)) as u64 & self.mask()
    }

    fn back(self, steps: u64, changed: u64) -> u64 {
        let signed = (steps >> 1) ^ (steps & 1).wrapping_neg();
        self.unordered(self.ordered(changed).wrapping_add(signed) & self.mask())
    }
}

/// The running mean of steps in a context.
#[derive(Clone, Copy)]
struct Mean {
    sum: u64,
    count: u64,
}

impl Mean {
    /// Low bits that are written as they are: the count shifted by them reaches the sum.
    fn low_bits(self) -> u32 {
        if self.sum <= self.count {
            return 0;
        }
        // Shifted so, both have the same number of bits; one more is enough.
        let shift = self.count.leading_zeros() - self.sum.leading_zeros();
        if self.count << shift >= self.sum { shift } else { shift + 1 }
    }

    fn add(&mut self, steps: u64) {
        self.sum += steps.min(1 << 50);
        self.count += 1;
        if self.count == MEMORY {
            self.sum /= 2;
            self.count /= 2;
        }
    }
}

#[derive(Default)]
struct Writer {
    out: Vec<u8>,
    pending: u128,
    filled: u32,
}

impl Writer {
    fn put(&mut self, value: u64, bits: u32) {
        self.pending |= u128::from(value) << self.filled;
        self.filled += bits;
        if self.filled >= 64 {
            self.out.extend_from_slice(&(self.pending as u64).to_le_bytes());
            self.pending >>= 64;
            self.filled -= 64;
        }
    }

    fn finish(mut self) -> Vec<u8> {
        let rest = self.filled.div_ceil(8) as usize;
        self.out.extend_from_slice(&self.pending.to_le_bytes()[..rest]);
        self.out
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    pending: u128,
    filled: u32,
}

impl Reader<'_> {
    fn fill(&mut self) {
        if self.filled < 64 {
            let (now, later) = self.rest.split_at(self.rest.len().min(8));
            let mut raw = [0; 8];
            raw[..now.len()].copy_from_slice(now);
            self.pending |= u128::from(u64::from_le_bytes(raw)) << self.filled;
            self.filled += 8 * now.len() as u32;
            self.rest = later;
        }
    }

    /// `None` at the end.
    fn take(&mut self, bits: u32) -> Option<u64> {
        self.fill();
        if self.filled < bits {
            return None;
        }
        let value = (self.pending as u64) & (u64::MAX.checked_shr(64 - bits).unwrap_or(0));
        self.pending >>= bits;
        self.filled -= bits;
        Some(value)
    }

    fn zeros(&mut self) -> Option<u32> {
        self.fill();
        let zeros = self.pending.trailing_zeros();
        if zeros > LIMIT || zeros >= self.filled {
            return None;
        }
        self.pending >>= zeros + 1;
        self.filled -= zeros + 1;
        Some(zeros)
    }
}

/// The original numbers, in terms of the changed ones. Both have the same length, whole elements.
pub(super) fn encode(dtype: Dtype, original: &[u8], changed: &[u8]) -> Vec<u8> {
    let width = Width::of(dtype);
    let mut means = vec![Mean { sum: 4, count: 1 }; width.contexts()];
    let mut out = Writer::default();
    for (o, c) in original.chunks_exact(width.bytes).zip(changed.chunks_exact(width.bytes)) {
        let (o, c) = (width.read(o), width.read(c));
        let steps = width.steps(o, c);
        let mean = &mut means[width.context(c)];
        let low = mean.low_bits();
        let high = steps >> low;
        if high < u64::from(LIMIT) {
            out.put(1 << high, high as u32 + 1);
            out.put(steps & ((1 << low) - 1), low);
        } else {
            out.put(1 << LIMIT, LIMIT + 1);
            out.put(steps, width.bits);
        }
        mean.add(steps);
    }
    out.finish()
}

/// The original numbers from the changed ones, in their place. Returns whether the code was whole; if not, the numbers
/// are none.
#[must_use]
pub(super) fn decode(dtype: Dtype, code: &[u8], changed: &[u8], out: &mut [u8]) -> bool {
    let width = Width::of(dtype);
    let mut means = vec![Mean { sum: 4, count: 1 }; width.contexts()];
    let mut code = Reader { rest: code, pending: 0, filled: 0 };
    for (o, c) in out.chunks_exact_mut(width.bytes).zip(changed.chunks_exact(width.bytes)) {
        let c = width.read(c);
        let mean = &mut means[width.context(c)];
        let low = mean.low_bits();
        let steps = match code.zeros() {
            None => return false,
            Some(LIMIT) => code.take(width.bits),
            Some(high) => code.take(low).map(|rest| (u64::from(high) << low) | rest),
        };
        let Some(steps) = steps else { return false };
        mean.add(steps);
        o.copy_from_slice(&width.back(steps, c).to_le_bytes()[..width.bytes]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Counter;

    const TYPES: [Dtype; 6] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8E4M3, Dtype::F8E5M2];

    fn restored(dtype: Dtype, original: &[u8], changed: &[u8]) -> usize {
        let code = encode(dtype, original, changed);
        let mut out = vec![0; original.len()];
        assert!(decode(dtype, &code, changed, &mut out));
        assert_eq!(out, original, "{dtype:?}");
        code.len()
    }

    #[test]
    fn any_bits_come_back() {
        let stream = Counter::new(1, "bits");
        let bytes = |first: u64| (0..4096).map(|i| (stream.uniform(first + i) * 256.0) as u8).collect::<Vec<u8>>();
        let (a, b) = (bytes(0), bytes(10_000));
        for dtype in TYPES {
            restored(dtype, &a, &b);
            restored(dtype, &a, &a);
            restored(dtype, &[], &[]);
            restored(dtype, &[0xff; 64], &[0; 64]);
            restored(dtype, &[0; 64], &[0xff; 64]);
        }
    }

    #[test]
    fn small_changes_take_few_bits() {
        let stream = Counter::new(2, "weights");
        let n = 1 << 16;
        let bits = |v: f64| crate::dtype::round_bf16(v as f32).to_le_bytes();
        let weights: Vec<f64> = (0..n).map(|i| 0.02 * stream.normal(i)).collect();
        let original: Vec<u8> = weights.iter().flat_map(|w| bits(*w)).collect();
        let changed: Vec<u8> =
            weights.iter().enumerate().flat_map(|(i, w)| bits(w + 2e-4 * stream.normal(n + i as u64))).collect();
        let size = restored(Dtype::BF16, &original, &changed);
        assert!(size * 3 < original.len(), "{size} of {}", original.len());
        assert!(restored(Dtype::BF16, &original, &original) * 12 < original.len());
    }

    #[test]
    fn low_bits_by_their_definition() {
        for (sum, count) in (0..400u64).flat_map(|sum| (1..64).map(move |count| (sum * sum * sum, count))) {
            let want = (0..64).find(|k| count << k >= sum).expect("some shift is enough");
            assert_eq!(Mean { sum, count }.low_bits(), want, "{sum} {count}");
        }
    }

    #[test]
    fn cut_codes_are_seen() {
        let (a, b) = ([1u8, 2, 3, 4, 5, 6, 7, 8], [8u8, 7, 6, 5, 4, 3, 2, 1]);
        let code = encode(Dtype::BF16, &a, &b);
        assert!(!decode(Dtype::BF16, &code[..code.len() / 2], &b, &mut [0; 8]));
        assert!(!decode(Dtype::BF16, &[], &b, &mut [0; 8]));
        assert!(!decode(Dtype::BF16, &[0; 64], &b, &mut [0; 8]));
    }
}
