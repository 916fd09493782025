//! Vectors over channels (biases, smoothing factors) in the order of the kernels.

use std::ops::Range;
use std::sync::Arc;

use crate::cast::Loss;
use crate::dtype::Dtype;
use crate::tensor::{Derived, Tensor};

/// Channels that are ordered among themselves.
pub const GROUP: usize = 128;

/// The position of element `n` of a 16-bit vector in the order of the kernels, by groups of 128 channels (nunchaku:
/// `pack_scale`).
pub fn vector_position(n: usize) -> usize {
    let within = n % GROUP;
    let (strip, row) = (within / 16, within % 16);
    let lane = strip * 4 + (row % 8) / 2;
    n / GROUP * GROUP + lane * 4 + (row / 8) * 2 + row % 2
}

/// The element at a position: the reverse of [`vector_position`].
fn vector_element(position: usize) -> usize {
    let within = position % GROUP;
    let (lane, place) = (within / 4, within % 4);
    position / GROUP * GROUP + lane / 4 * 16 + place / 2 * 8 + lane % 4 * 2 + place % 2
}

/// A vector in the order of the kernels. Its length is a multiple of [`GROUP`].
pub fn pack_vector(vector: &Tensor) -> Tensor {
    reordered(vector, vector_element)
}

/// A vector in the order of channels, from that of the kernels.
pub fn unpack_vector(packed: &Tensor) -> Tensor {
    reordered(packed, vector_position)
}

fn reordered(vector: &Tensor, from: fn(usize) -> usize) -> Tensor {
    assert!(vector.rows().is_multiple_of(GROUP), "whole groups only");
    let inner = vector.clone();
    Tensor::derived(Arc::new(Reordered { inner, from })).reshaped(vector.shape().to_vec())
}

/// A vector whose element n is element `from(n)` of another, of the same group.
#[derive(Debug)]
struct Reordered {
    inner: Tensor,
    from: fn(usize) -> usize,
}

impl Derived for Reordered {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.inner]
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn size(&self) -> (usize, usize) {
        (self.inner.rows(), 1)
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let size = self.dtype().size();
        let first = rows.start / GROUP * GROUP;
        let last = rows.end.next_multiple_of(GROUP);
        let mut group = vec![0; (last - first) * size];
        let loss = self.inner.read(first..last, &mut group);
        for (row, element) in rows.zip(out.chunks_exact_mut(size)) {
            let at = ((self.from)(row) - first) * size;
            element.copy_from_slice(&group[at..at + size]);
        }
        loss
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_start_as_documented() {
        let order: Vec<usize> = (0..256).map(vector_element).collect();
        assert_eq!(order[..8], [0, 1, 8, 9, 2, 3, 10, 11]);
        assert_eq!(order[128], 128);
        assert!((0..512).all(|n| vector_element(vector_position(n)) == n));
    }

    #[test]
    fn vectors_are_packed_and_unpacked() {
        let bytes: Vec<u8> = (0..384u16).flat_map(u16::to_le_bytes).collect();
        let vector = Tensor::constant(Dtype::BF16, vec![384], bytes.clone());
        let packed = pack_vector(&vector);
        assert_eq!(packed.shape(), [384]);
        let mut part = vec![0; 2 * 130];
        packed.read(127..257, &mut part);
        let read: Vec<usize> = part.as_chunks::<2>().0.iter().map(|b| usize::from(u16::from_le_bytes(*b))).collect();
        assert_eq!(read, (127..257).map(vector_element).collect::<Vec<_>>());
        let mut back = vec![0; bytes.len()];
        unpack_vector(&packed).read(0..384, &mut back);
        assert_eq!(back, bytes);
    }
}
