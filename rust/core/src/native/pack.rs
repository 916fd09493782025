//! The packing of low-rank factors in 16-bit types: 16 x 16 tiles in the order in which tensor cores read them.
//!
//! A tile is 256 consecutive elements. Element (i, j) of a tile stands at
//! `((i mod 8) * 4 + (j mod 8) / 2) * 8 + (i / 8) * 4 + (j / 8) * 2 + j mod 2`: the B operand of an m16n8k16 product, one
//! lane of a warp after the other (nunchaku: `lora/flux/packer.py`). Tiles of one channel group lie together, rank
//! after rank, so that further ranks are appended by copying whole tiles.

use std::ops::Range;

use crate::cast::Loss;
use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::tensor::{Derived, Tensor};

/// Rows and columns of a tile; ranks are multiples of it.
pub const TILE: usize = 16;

/// Bytes of a tile.
const TILE_BYTES: usize = TILE * TILE * 2;

/// Pairs of elements in a row of a tile: they move together.
const PAIRS: usize = TILE / 2;

/// Which side of a factor is the rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `lora_down`: rank rows, input columns.
    Down,
    /// `lora_up`: output rows, rank columns.
    Up,
}

impl Side {
    /// Rank and channels of a matrix.
    fn split(self, matrix: &Tensor) -> (usize, usize) {
        match self {
            Side::Down => (matrix.rows(), matrix.cols()),
            Side::Up => (matrix.cols(), matrix.rows()),
        }
    }
}

/// Where pair `p` of row `i` of a tile goes, in pairs.
const fn place(i: usize, p: usize) -> usize {
    ((i % 8) * 4 + p % 4) * 4 + (i / 8) * 2 + p / 4
}

/// Packs a tile: row `i` of it starts at byte `i * stride` of `rows`.
fn pack_tile(rows: &[u8], stride: usize, out: &mut [u8; TILE_BYTES]) {
    let (words, _) = out.as_chunks_mut::<4>();
    for i in 0..TILE {
        let (row, _) = rows[i * stride..i * stride + TILE * 2].as_chunks::<4>();
        for (p, pair) in row.iter().enumerate() {
            words[place(i, p)] = *pair;
        }
    }
}

/// The first ranks of a branch that is packed already: taken tile by tile, never unpacked.
#[derive(Debug, Clone)]
pub struct Branch {
    /// `[channels, rank]` as stored.
    pub packed: Tensor,
    /// How many of its ranks are taken; a multiple of [`TILE`].
    pub ranks: usize,
}

/// A packed factor: the tiles of a branch, then those of a matrix.
#[derive(Debug)]
struct Packed {
    branch: Option<Branch>,
    /// `[rank, channels]` or `[channels, rank]`; both are multiples of [`TILE`].
    matrix: Tensor,
    side: Side,
}

impl Packed {
    fn tiles(&self) -> (usize, usize) {
        let branch = self.branch.as_ref().map_or(0, |b| b.ranks / TILE);
        (branch, self.side.split(&self.matrix).0 / TILE)
    }

    /// Packs the channel groups `groups`.
    fn read_groups(&self, groups: Range<usize>, out: &mut [u8]) -> Loss {
        let (taken, added) = self.tiles();
        let line = (taken + added) * TILE_BYTES;
        if let Some(branch) = &self.branch {
            let bytes = branch.packed.contiguous().unwrap_or(&[]);
            let whole = branch.packed.cols() / TILE * TILE_BYTES;
            for (group, target) in groups.clone().zip(out.chunks_exact_mut(line)) {
                target[..taken * TILE_BYTES].copy_from_slice(&bytes[group * whole..][..taken * TILE_BYTES]);
            }
        }
        if added == 0 {
            return Loss::default();
        }
        let channels = groups.start * TILE..groups.end * TILE;
        match self.side {
            Side::Down => self.pack_down(channels, line, taken, added, out),
            Side::Up => self.pack_up(channels, line, taken, added, out),
        }
    }

    fn pack_down(&self, channels: Range<usize>, line: usize, taken: usize, added: usize, out: &mut [u8]) -> Loss {
        let strip = self.matrix.slice_cols(channels);
        let stride = strip.cols() * 2;
        let mut scratch = vec![0; TILE * stride];
        let mut loss = Loss::default();
        for tile in 0..added {
            loss |= strip.read(tile * TILE..(tile + 1) * TILE, &mut scratch);
            let at = (taken + tile) * TILE_BYTES;
            for (group, target) in out.chunks_exact_mut(line).enumerate() {
                if let Some(target) = target[at..].first_chunk_mut() {
                    pack_tile(&scratch[group * TILE * 2..], stride, target);
                }
            }
        }
        loss
    }

    fn pack_up(&self, channels: Range<usize>, line: usize, taken: usize, added: usize, out: &mut [u8]) -> Loss {
        let stride = added * TILE * 2;
        let mut scratch = vec![0; channels.len() * stride];
        let loss = self.matrix.read(channels, &mut scratch);
        for (rows, target) in scratch.chunks_exact(TILE * stride).zip(out.chunks_exact_mut(line)) {
            let (tiles, _) = target[taken * TILE_BYTES..].as_chunks_mut::<TILE_BYTES>();
            for (tile, target) in tiles.iter_mut().enumerate() {
                pack_tile(&rows[tile * TILE * 2..], stride, target);
            }
        }
        loss
    }
}

impl Derived for Packed {
    fn parts(&self) -> Vec<&Tensor> {
        self.branch.iter().map(|b| &b.packed).chain([&self.matrix]).collect()
    }

    fn dtype(&self) -> Dtype {
        self.matrix.dtype()
    }

    fn size(&self) -> (usize, usize) {
        let (taken, added) = self.tiles();
        (self.side.split(&self.matrix).1, (taken + added) * TILE)
    }

    fn block(&self) -> usize {
        TILE
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        // The nominal rows of a channel group are its tiles; only whole groups can be packed.
        let groups = rows.start / TILE..rows.end.div_ceil(TILE);
        if rows.start.is_multiple_of(TILE) && rows.end.is_multiple_of(TILE) {
            return self.read_groups(groups, out);
        }
        let line = self.size().1 * 2;
        let mut whole = vec![0; groups.len() * TILE * line];
        let loss = self.read_groups(groups.clone(), &mut whole);
        out.copy_from_slice(&whole[(rows.start - groups.start * TILE) * line..][..rows.len() * line]);
        loss
    }
}

/// A factor that is stored packed, as a matrix.
#[derive(Debug)]
struct Unpacked {
    /// `[channels, rank]` as stored, in one run.
    packed: Tensor,
    side: Side,
}

impl Derived for Unpacked {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.packed]
    }

    fn dtype(&self) -> Dtype {
        self.packed.dtype()
    }

    fn size(&self) -> (usize, usize) {
        match self.side {
            Side::Down => (self.packed.cols(), self.packed.rows()),
            Side::Up => (self.packed.rows(), self.packed.cols()),
        }
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let (tiles, _) = self.packed.contiguous().unwrap_or(&[]).as_chunks::<TILE_BYTES>();
        let (_, cols) = self.size();
        let ranks = self.packed.cols() / TILE;
        for (row, target) in rows.zip(out.chunks_exact_mut(cols.max(1) * 2)) {
            let (pairs, _) = target.as_chunks_mut::<4>();
            for (across, pairs) in pairs.chunks_exact_mut(PAIRS).enumerate() {
                let tile = match self.side {
                    Side::Down => across * ranks + row / TILE,
                    Side::Up => (row / TILE) * ranks + across,
                };
                let (words, _) = tiles[tile].as_chunks::<4>();
                for (p, pair) in pairs.iter_mut().enumerate() {
                    *pair = words[place(row % TILE, p)];
                }
            }
        }
        Loss::default()
    }
}

/// A factor packed behind the first ranks of a branch.
///
/// `matrix` is of a 16-bit type, `[rank, channels]` or `[channels, rank]`, both multiples of [`TILE`]; the result is
/// `[channels, ranks of both]`, which says how large it is and nothing of its order. The branch is copied as it lies.
pub fn pack(branch: Option<Branch>, matrix: Tensor, side: Side) -> Tensor {
    let (rank, channels) = side.split(&matrix);
    assert!(rank.is_multiple_of(TILE) && channels.is_multiple_of(TILE), "whole tiles only");
    assert_eq!(matrix.dtype().size(), 2, "packing is defined for 16-bit types");
    let whole = branch.as_ref().is_some_and(|b| b.ranks == b.packed.cols());
    match branch {
        Some(branch) if rank == 0 && whole => branch.packed,
        branch => Tensor::derived(std::sync::Arc::new(Packed { branch, matrix, side })),
    }
}

/// A stored factor as a matrix. `name` is its key, for errors.
pub fn unpack(packed: &Tensor, side: Side, name: &str) -> Result<Tensor> {
    let (channels, rank) = (packed.rows(), packed.cols());
    let sound = packed.shape().len() == 2
        && channels.is_multiple_of(TILE)
        && rank.is_multiple_of(TILE)
        && matches!(packed.dtype(), Dtype::F16 | Dtype::BF16);
    if !sound {
        let message = format!(
            "`{name}` is {} of shape {:?}; packed factors are 16-bit, with both sides multiples of {TILE}",
            packed.dtype().name(),
            packed.shape()
        );
        return Err(Error::new(Code::InvalidPacking, message).key(name));
    }
    if rank == 0 {
        let shape = if side == Side::Down { vec![0, channels] } else { vec![channels, 0] };
        return Ok(Tensor::zeros(packed.dtype(), shape));
    }
    if packed.contiguous().is_none() {
        return Err(Error::new(Code::InvalidPacking, format!("`{name}` is not stored in one run")).key(name));
    }
    Ok(Tensor::derived(std::sync::Arc::new(Unpacked { packed: packed.clone(), side })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize) -> Tensor {
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| (i as u16).to_le_bytes()).collect();
        Tensor::constant(Dtype::BF16, vec![rows, cols], bytes)
    }

    fn bits(t: &Tensor) -> Vec<u16> {
        let mut bytes = Vec::new();
        t.read_rows_into(0..t.rows(), &mut bytes);
        bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect()
    }

    fn stored(t: &Tensor) -> Tensor {
        let mut bytes = Vec::new();
        t.read_rows_into(0..t.rows(), &mut bytes);
        Tensor::constant(t.dtype(), t.shape().to_vec(), bytes)
    }

    #[test]
    fn one_tile_by_the_formula() {
        let packed = bits(&pack(None, matrix(16, 16), Side::Up));
        for i in 0..16 {
            for j in 0..16 {
                let at = ((i % 8) * 4 + (j % 8) / 2) * 8 + (i / 8) * 4 + (j / 8) * 2 + j % 2;
                assert_eq!(packed[at], (16 * i + j) as u16, "{i} {j}");
            }
        }
    }

    #[test]
    fn tiles_lie_channel_by_channel() {
        let (down, up) = (matrix(32, 48), matrix(48, 32));
        let off = |i: usize, j: usize| ((i % 8) * 4 + (j % 8) / 2) * 8 + (i / 8) * 4 + (j / 8) * 2 + j % 2;
        let packed = bits(&pack(None, down, Side::Down));
        for (r, k) in [(0, 0), (17, 3), (31, 47), (5, 33)] {
            assert_eq!(packed[((k / 16) * 2 + r / 16) * 256 + off(r % 16, k % 16)], (r * 48 + k) as u16);
        }
        let packed = bits(&pack(None, up, Side::Up));
        for (n, r) in [(0, 0), (17, 3), (47, 31), (33, 5)] {
            assert_eq!(packed[((n / 16) * 2 + r / 16) * 256 + off(n % 16, r % 16)], (n * 32 + r) as u16);
        }
    }

    #[test]
    fn unpacking_undoes_packing_and_branches_come_first() {
        for (side, first, second) in
            [(Side::Down, matrix(16, 32), matrix(32, 32)), (Side::Up, matrix(32, 16), matrix(32, 32))]
        {
            let branch = stored(&pack(None, first.clone(), side));
            assert_eq!(branch.shape(), [32, 16]);
            let both = stored(&pack(Some(Branch { packed: branch.clone(), ranks: 16 }), second.clone(), side));
            assert_eq!(both.shape(), [32, 48]);
            let parts = [first, second.clone()];
            let want = if side == Side::Down { Tensor::stack_rows(&parts) } else { Tensor::stack_cols(&parts) };
            assert_eq!(bits(&unpack(&both, side, "x").expect("sound")), bits(&want));
            // Part of a branch, too.
            let again = pack(Some(Branch { packed: both, ranks: 16 }), second, side);
            assert_eq!(again.shape(), [32, 48]);
            let back = unpack(&stored(&again), side, "x").expect("sound");
            assert_eq!(bits(&back), bits(&want));
        }
    }

    #[test]
    fn any_rows_can_be_read() {
        let packed = pack(None, matrix(32, 48), Side::Down);
        let all = bits(&packed);
        let mut bytes = Vec::new();
        packed.read_rows_into(5..22, &mut bytes);
        let read: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
        assert_eq!(read, all[5 * 32..22 * 32]);
        assert_eq!(packed.block(), 16);
    }

    #[test]
    fn what_cannot_be_packed_is_refused() {
        for bad in [matrix(16, 24), matrix(8, 16), Tensor::zeros(Dtype::F32, vec![16, 16])] {
            let error = unpack(&bad, Side::Up, "key").expect_err("unsound");
            assert_eq!((error.code(), error.key_name()), (Code::InvalidPacking, Some("key")));
        }
    }
}
