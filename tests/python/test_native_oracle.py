"""The native oracle itself: its packing against the definition and against Nunchaku's own digests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import oracle
from bases import DAMAGES, LAYOUTS, PRECISIONS, BaseSpec, make_base
from golden import Golden, assert_truth, diffusers_by_rule, digest, names, native_by_rule, write_by_rule
from native import (
    Base,
    Native,
    NotNative,
    deinterleave,
    deltas_of_native,
    interleave,
    layers_of,
    name_v2,
    pack,
    pack_vectors,
    unpack,
    unpack_vectors,
)
from tensorfile import Planned, TensorFile, encode, save, save_planned

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


# -------------------------------------------------------------------------------- reading native files

READ_BACK = ("kohya_split_r4", "kohya_full_r8", "diffusers_mixed_ranks", "diffusers_equal_r16", "kohya_te_r4")


@pytest.mark.parametrize("name", READ_BACK)
def test_nunchakus_files_are_read_back(golden: Golden, scratch: Path, name: str) -> None:
    base = Base(golden.path("base_bf16"))
    target = write_by_rule(scratch / "native.safetensors", golden.path(name), base)
    expected = oracle.reference(golden.path(name))
    expected = {module: delta for module, delta in expected.items() if not module.startswith("text_encoder")}
    comparison = oracle.compare(expected, deltas_of_native(target, base), 1e-12)
    assert comparison, str(comparison)
    with pytest.raises(NotNative, match="does not start with its base's"):
        deltas_of_native(target, golden.path("base_other"))


def test_what_is_unsound_is_noticed(golden: Golden, scratch: Path) -> None:
    base = Base(golden.path("base_bf16"))
    sound = TensorFile(write_by_rule(scratch / "native.safetensors", golden.path("xlabs_r16"), base))
    tensors = {k: Planned(e.dtype, e.shape, sound.raw(k).tobytes) for k, e in sound.header.items()}
    name = "transformer_blocks.0.mlp_fc1"
    up = unpack(np.frombuffer(tensors[f"{name}.lora_up"].content(), "<u2").reshape(12288, 32), down=False)
    down = unpack(np.frombuffer(tensors[f"{name}.lora_down"].content(), "<u2").reshape(3072, 32), down=True)
    longer = {
        f"{name}.lora_up": Planned("BF16", (12288, 48), pack(np.pad(up, ((0, 0), (0, 16))), down=False).tobytes),
        f"{name}.lora_down": Planned("BF16", (3072, 48), pack(np.pad(down, ((0, 16), (0, 0))), down=True).tobytes),
    }
    bias = np.zeros(3072, np.float32).tobytes
    changes: list[tuple[str, dict[str, Planned | None]]] = [
        ("lacks one factor", {f"{name}.lora_up": None}),
        ("no branch for", {f"{name}.lora_up": None, f"{name}.lora_down": None}),
        ("have ranks", dict(longer)),
        ("is no layer's branch", {"transformer_blocks.0.attn.to_q.lora_A": Planned("BF16", (16, 3072))}),
        ("has no block", {"transformer_blocks.7.mlp_fc1.lora_up": Planned("BF16", (12288, 32))}),
        ("has a down factor", {f"{name}.lora_down": Planned("BF16", (3088, 32))}),
        ("is F32", {"transformer_blocks.0.attn.to_out.0.bias": Planned("F32", (3072,), bias)}),
        ("belongs to no layer", {"transformer_blocks.0.attn.to_q.bias": Planned("BF16", (3072,))}),
        ("is no key", {"x_embedder.alpha": Planned("BF16", ())}),
    ]
    for number, (words, change) in enumerate(changes):
        changed = {k: v for k, v in {**tensors, **change}.items() if v}
        save_planned(scratch / f"{number}.safetensors", changed)
        with pytest.raises(NotNative, match=words):
            deltas_of_native(scratch / f"{number}.safetensors", base)


def test_smoothing_that_was_folded_into_the_values(scratch: Path) -> None:
    """The branch of out_proj sees inputs that were divided; what it and the rows of v hold makes up for that."""
    base = Base(make_base(scratch / "base.safetensors", BaseSpec(rank=16, fused=True)))
    rng = np.random.default_rng(3)
    adapted = {"to_out.0": "", "to_add_out": "", "to_q": "", "to_v": "", "add_v_proj": ""}
    plain, changed = {}, {}
    for leaf in adapted:
        down, up = rng.standard_normal((2, 4, 3072)).astype(np.float32) * np.float32(0.02)
        name = f"transformer.transformer_blocks.0.attn.{leaf}.lora_"
        factor = base.smoothing("transformer_blocks.0")
        assert factor is not None
        plain |= {f"{name}A.weight": (down, "F32"), f"{name}B.weight": (up.T, "F32")}
        wide = down * factor if "out" in leaf else down
        tall = up / factor if "v" in leaf else up
        changed |= {f"{name}A.weight": (wide, "F32"), f"{name}B.weight": (tall.T, "F32")}
    save(scratch / "plain.safetensors", plain)
    save(scratch / "changed.safetensors", changed)
    target = write_by_rule(scratch / "native.safetensors", scratch / "changed.safetensors", base)
    comparison = oracle.compare(oracle.reference(scratch / "plain.safetensors"), deltas_of_native(target, base), 2**-8)
    assert comparison, str(comparison)


def test_the_folded_factors_are_those_of_the_attentions_output() -> None:
    """(W_o + B_o A_o) v with v = (W_v + B_v A_v) x, as a model does it that keeps v / s and W_o s."""
    rng = np.random.default_rng(4)
    w_v, w_o, x, s = rng.standard_normal((8, 8)), rng.standard_normal((8, 8)), rng.standard_normal(8), rng.random(8) + 1
    a_v, b_v, a_o, b_o = (rng.standard_normal(shape) for shape in ((2, 8), (8, 2), (2, 8), (8, 2)))
    expected = (w_o + b_o @ a_o) @ (w_v + b_v @ a_v) @ x
    inner = (w_v / s[:, None]) @ x + (b_v / s[:, None]) @ (a_v @ x)
    assert np.allclose((w_o * s) @ inner + b_o @ ((a_o * s) @ inner), expected)


# -------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bases_are_one_model_under_every_name(scratch: Path, layout: str, precision: str) -> None:
    spec = BaseSpec(rank=16, precision=precision)
    plain = Base(make_base(scratch / "plain.safetensors", spec))
    other = Base(make_base(scratch / "other.safetensors", replace(spec, layout=layout)))
    assert other.blocks == plain.blocks
    for block in plain.blocks:
        for layer in layers_of(block):
            ours, theirs = (base.branch(f"{block}.{layer.name}") for base in (plain, other))
            assert ours and theirs
            assert np.array_equal(ours.down, theirs.down) and np.array_equal(ours.up, theirs.up)
            assert np.array_equal(ours.down.any(axis=0), np.ones(16, bool))
    assert ("x_embedder.weight" in other.file.header) is (layout != "blocks")
    assert bool(other.file.metadata) is (layout != "blocks")


def test_a_whole_base_has_as_many_tensors_as_the_published_ones(scratch: Path) -> None:
    everything = tuple(f"{kind}_blocks.{i}" for kind in ("transformer", "single_transformer") for i in range(38))
    layers = tuple(f"{block}.{layer.name}" for block in everything for layer in layers_of(block))
    path = make_base(scratch / "base.safetensors", BaseSpec(19, 38, layout="v1", empty=layers))
    assert len(TensorFile(path)) == 2604
    assert path.stat().st_blocks * 512 < 40 << 20


def test_bases_load_in_safetensors(scratch: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    for number, layout in enumerate(LAYOUTS):
        for damage in ("", *DAMAGES):
            path = scratch / f"{number}.safetensors"
            make_base(path, BaseSpec(layout=layout, precision=PRECISIONS[number % 2], damage=damage))
            with safetensors.safe_open(path, "np") as file:
                assert len(list(file.keys())) == len(TensorFile(path))


def test_a_native_file_is_read_under_either_name(golden: Golden, scratch: Path) -> None:
    """The names of the second generation are read too: what counts is which layer a branch belongs to."""
    base = Base(golden.path("base_bf16"))
    first = TensorFile(write_by_rule(scratch / "1.safetensors", golden.path("xlabs_r16"), base))
    tensors = {name_v2(k): Planned(e.dtype, e.shape, first.raw(k).tobytes) for k, e in first.header.items()}
    save_planned(scratch / "2.safetensors", tensors)
    assert Native(scratch / "2.safetensors", base).layers.keys() == Native(first.path, base).layers.keys()
