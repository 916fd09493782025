//! The k largest elements of a matrix that is only seen by rows.

use std::ops::Range;

use crate::linalg::{Matrix, Tall};

/// Elements that are read at a time.
const TILE: usize = 1 << 20;

/// The rows of a matrix, some at a time: always the same ones, so that sums do not depend on who asks.
pub(super) fn tiles(matrix: &dyn Tall) -> impl Iterator<Item = (Range<usize>, Matrix)> + '_ {
    let step = (TILE / matrix.cols().max(1)).max(1);
    let rows = matrix.rows();
    (0..rows).step_by(step).map(move |start| {
        let range = start..rows.min(start + step);
        (range.clone(), matrix.read(range))
    })
}

/// Where the k largest elements end. Sizes are compared as float32; of equal ones the first count as larger, so that it
/// is exactly k.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    key: u32,
    /// The last element of that very size that is inside, by its index in the matrix.
    last: u64,
}

/// The size of an element: the bits of a float32 without its sign are in the order of their values.
fn key(x: f64) -> u32 {
    (x.abs() as f32).to_bits()
}

impl Cut {
    /// The k largest elements, 1 <= k <= elements. Three passes at the most: a histogram over the upper halves of the
    /// bits, one over the lower halves, and a count of equal elements.
    pub(super) fn new(matrix: &dyn Tall, k: u64) -> Self {
        let (upper, more) = bucket(&histogram(matrix, |key| Some(key >> 16)), k);
        let lows = histogram(matrix, |key| (key >> 16 == upper).then_some(key & 0xFFFF));
        let (lower, more) = bucket(&lows, more);
        let at = upper << 16 | lower;
        let last = if lows[lower as usize] == more { u64::MAX } else { place(matrix, at, more) };
        Self { key: at, last }
    }

    /// Whether an element is among them.
    pub(super) fn holds(&self, x: f64, index: u64) -> bool {
        let key = key(x);
        key > self.key || key == self.key && index <= self.last
    }
}

/// How many elements fall into each of 2^16 buckets.
fn histogram(matrix: &dyn Tall, bucket: impl Fn(u32) -> Option<u32>) -> Vec<u64> {
    let mut counts = vec![0; 1 << 16];
    for (_, tile) in tiles(matrix) {
        tile.data().iter().filter_map(|x| bucket(key(*x))).for_each(|b| counts[b as usize] += 1);
    }
    counts
}

/// The bucket of the k-th largest element, and how many of it are wanted.
fn bucket(counts: &[u64], k: u64) -> (u32, u64) {
    let mut left = k;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if *count >= left {
            return (bucket as u32, left);
        }
        left -= count;
    }
    unreachable!("k is at most the number of elements")
}

/// The index of the n-th element of one size.
fn place(matrix: &dyn Tall, at: u32, n: u64) -> u64 {
    let mut left = n;
    for (range, tile) in tiles(matrix) {
        let first = range.start * matrix.cols();
        for (i, _) in tile.data().iter().enumerate().filter(|(_, x)| key(**x) == at) {
            left -= 1;
            if left == 0 {
                return (first + i) as u64;
            }
        }
    }
    unreachable!("there are n of them")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Counter;

    fn kept(matrix: &Matrix, k: u64) -> Vec<usize> {
        let cut = Cut::new(matrix, k);
        (0..matrix.data().len()).filter(|&i| cut.holds(matrix.data()[i], i as u64)).collect()
    }

    #[test]
    fn exactly_the_largest() {
        let noise = Counter::new(1, "cut");
        let matrix = Matrix::from_fn(37, 23, |i, j| noise.normal((i * 23 + j) as u64));
        let mut order: Vec<usize> = (0..37 * 23).collect();
        order.sort_by(|a, b| matrix.data()[*b].abs().total_cmp(&matrix.data()[*a].abs()));
        for k in [1, 2, 100, 850, 851] {
            let mut wanted = order[..k].to_vec();
            wanted.sort_unstable();
            assert_eq!(kept(&matrix, k as u64), wanted, "{k}");
        }
    }

    #[test]
    fn of_equal_ones_the_first() {
        let matrix = Matrix::new(2, 4, vec![1., -2., 2., 0., 2., -0., 2., 5.]);
        assert_eq!(kept(&matrix, 1), [7]);
        assert_eq!(kept(&matrix, 3), [1, 2, 7]);
        assert_eq!(kept(&matrix, 4), [1, 2, 4, 7]);
        assert_eq!(kept(&matrix, 7), [0, 1, 2, 3, 4, 6, 7]);
        assert_eq!(kept(&matrix, 8).len(), 8);
    }

    #[test]
    fn tiles_make_no_difference() {
        // Two tiles and a bit; every other element is one.
        let rows = 2 * TILE / 4 + 3;
        let matrix = Matrix::from_fn(rows, 4, |_, j| f64::from(j as u32 % 2));
        let kept = kept(&matrix, TILE as u64 + 1);
        assert_eq!((kept.len(), kept[TILE]), (TILE + 1, 2 * TILE + 1));
    }
}
