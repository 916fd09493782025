//! Decisions made of fuzz bytes, and tensors made of decisions.

use std::sync::{Arc, OnceLock};

use lorafmt_core::dtype::Dtype;
use lorafmt_core::io::{Bytes, TensorInfo};

/// Reads one decision after the other; zeros once the bytes are used up.
pub(crate) struct Decisions<'a>(pub(crate) &'a [u8]);

impl Decisions<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number below `n`, which is at most 65536.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let wide = if n > 256 { usize::from(self.byte()) << 8 } else { 0 };
        (wide | usize::from(self.byte())) % n.max(1)
    }

    /// True once in `n` times.
    pub(crate) fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    pub(crate) fn pick<'t, T>(&mut self, all: &'t [T]) -> &'t T {
        &all[self.below(all.len())]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The start of one shared buffer, so that wide tensors cost nothing.
struct Shared(Arc<[u8]>, usize);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0[..self.1]
    }
}

/// More bytes than any tensor made here has.
const LONGEST: usize = 8 << 20;

/// A tensor of a fixed pattern of small numbers. `None` if it would be too long.
pub(crate) fn patterned(name: String, dtype: Dtype, shape: Vec<usize>) -> Option<(TensorInfo, Bytes)> {
    static PATTERN: OnceLock<Arc<[u8]>> = OnceLock::new();
    let pattern = PATTERN.get_or_init(|| (0..LONGEST).map(|i| [0, 0, 0x80, 0x3f][i % 4]).collect());
    let bytes = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d)).filter(|n| *n <= LONGEST)?;
    let info = TensorInfo { name, dtype, shape, range: 0..0 };
    Some((info, Box::new(Shared(Arc::clone(pattern), bytes))))
}

/// A float32 tensor of given values.
pub(crate) fn floats(name: String, shape: Vec<usize>, values: &[f32]) -> (TensorInfo, Bytes) {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (TensorInfo { name, dtype: Dtype::F32, shape, range: 0..0 }, Box::new(bytes))
}
