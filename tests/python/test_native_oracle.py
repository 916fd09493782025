"""The native oracle itself: its packing against the definition and against Nunchaku's own digests."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from golden import Golden, assert_truth, diffusers_by_rule, digest, names, native_by_rule
from native import Base, deinterleave, interleave, pack, pack_vectors, unpack, unpack_vectors
from tensorfile import encode

# -------------------------------------------------------------------------------- packing


def offset(i: int, j: int) -> int:
    """Where a tile keeps row i and column j, spelled out."""
    return ((i % 8) * 4 + (j % 8) // 2) * 8 + (i // 8) * 4 + (j // 8) * 2 + j % 2


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize(("channels", "rank"), [(16, 16), (48, 16), (32, 80), (128, 48)])
def test_every_number_has_its_place(channels: int, rank: int, down: bool) -> None:
    shape = (rank, channels) if down else (channels, rank)
    matrix = np.arange(channels * rank, dtype=np.uint16).reshape(shape)
    packed = pack(matrix, down=down)
    assert packed.shape == (channels, rank)
    flat = packed.ravel()
    for row in range(shape[0]):
        for column in range(shape[1]):
            channel, r = (column, row) if down else (row, column)
            tile = channel // 16 * (rank // 16) + r // 16
            assert flat[tile * 256 + offset(row % 16, column % 16)] == matrix[row, column]
    assert np.array_equal(unpack(packed, down=down), matrix)
    rest = unpack(packed, down=down, skip=16)
    assert np.array_equal(rest, matrix[16:] if down else matrix[:, 16:])


def test_known_tile() -> None:
    """The start, a lane in the middle and the end of one tile that holds 0, 1, 2, ... by rows."""
    tile = np.arange(256, dtype=np.int16).reshape(16, 16)
    for down in (True, False):
        packed = pack(tile, down=down).ravel()
        assert packed[:16].tolist() == [0, 1, 8, 9, 128, 129, 136, 137, 2, 3, 10, 11, 130, 131, 138, 139]
        assert packed[32:40].tolist() == [16, 17, 24, 25, 144, 145, 152, 153]
        assert packed[248:].tolist() == [118, 119, 126, 127, 246, 247, 254, 255]
    assert (offset(3, 13), offset(12, 6)) == (115, 156)


def test_ranks_are_added_by_tiles() -> None:
    """A packed factor with more ranks starts every channel tile with the tiles of the one it grew from."""
    small, more = np.random.default_rng(0).integers(0, 1 << 16, (2, 64, 32), np.uint16)
    for down in (True, False):
        axis = 0 if down else 1
        matrices = [m.T if down else m for m in (small, more)]
        both = pack(np.concatenate(matrices, axis=axis), down=down)
        tiles = [pack(m, down=down).reshape(4, 2, 256) for m in matrices]
        assert np.array_equal(both.reshape(4, 4, 256), np.concatenate(tiles, axis=1))


@pytest.mark.parametrize("groups", [1, 3])
def test_vectors_are_permuted_within_128(groups: int) -> None:
    values = np.arange(groups * 256, dtype=np.int32).reshape(groups, 256)
    packed = pack_vectors(values)
    assert packed.ravel()[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    for place, value in enumerate(packed.ravel()):
        lane, e = place % 128 // 4, place % 4
        channel = place // (128 * groups) * 128 + lane // 4 * 16 + e // 2 * 8 + lane % 4 * 2 + e % 2
        assert value == values[place // 128 % groups, channel]
    assert np.array_equal(unpack_vectors(packed), values)


@pytest.mark.parametrize("splits", [3, 6])
def test_splits_take_turns(splits: int) -> None:
    rows = np.arange(splits * 4 * 2).reshape(splits * 4, 2)
    stored = interleave(rows, splits)
    assert all(np.array_equal(stored[d * splits + s], rows[s * 4 + d]) for s in range(splits) for d in range(4))
    assert np.array_equal(deinterleave(stored, splits), rows)


# -------------------------------------------------------------------------------- Nunchaku's own output


@pytest.mark.parametrize("name", names("to_diffusers"))
def test_the_rule_gives_the_diffusers_bytes(golden: Golden, name: str) -> None:
    listing = {key.removeprefix("transformer."): tensor for key, tensor in golden.listing("to_diffusers", name).items()}
    made = {key: (values, dtype) for key, values, dtype in diffusers_by_rule(golden.path(name))}
    assert set(made) == set(listing)
    for key, (values, dtype) in made.items():
        assert (dtype, values.shape) == (listing[key].dtype, listing[key].shape), key
        assert listing[key].digest in (None, digest(encode(values, dtype))), key


@pytest.mark.parametrize("case", names("to_nunchaku"))
def test_the_rule_gives_the_native_bytes(golden: Golden, case: str) -> None:
    entry, listing = golden.data["to_nunchaku"][case], golden.listing("to_nunchaku", case)
    base = Base(golden.path(entry["base"]))
    made = {key: (bits, dtype) for key, bits, dtype in native_by_rule(golden.path(entry["input"]), base)}
    assert set(made) == set(listing)
    for key, (bits, dtype) in made.items():
        assert (dtype, bits.shape) == (listing[key].dtype, listing[key].shape), key
        raw = bits.tobytes() if bits.dtype == np.uint16 else encode(bits, dtype)
        assert listing[key].digest in (None, digest(raw)), key


@pytest.mark.parametrize("name", names("deltas"))
def test_the_oracle_knows_the_deltas(golden: Golden, name: str) -> None:
    truth = golden.truth("deltas", name)
    deltas = oracle.reference(golden.path(name))
    assert {f"transformer.{module}" for module in truth} == {m for m in deltas if not m.startswith("text_encoder")}
    for module, expected in truth.items():
        assert_truth(deltas[f"transformer.{module}"], expected, 1e-9)
