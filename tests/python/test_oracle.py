"""The oracle itself: names against the models, algebra against plain formulas, results against diffusers.

diffusers' own converters are a second opinion where they are right; where they lose or spoil modules, exactly
those must differ. (Known losses of diffusers 0.42: top-level kohya modules, half of a mixed file, the final
norm of control LoRAs, everything but attention of OneTrainer files.)
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import oracle
from flux_map import FLUX_LINEARS, SHAPES, TRANSFORMER
from tensorfile import TensorFile, encode, fp8_values, save

# -------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2"])
def test_values_survive_the_file(tmp_path: Path, dtype: str) -> None:
    """What was rounded once is exact ever after."""
    values = np.random.default_rng(1).standard_normal((7, 5)) * 0.5
    save(tmp_path / "a.safetensors", {"x": (values, dtype)})
    once = TensorFile(tmp_path / "a.safetensors")["x"]
    save(tmp_path / "b.safetensors", {"x": (once, dtype)})
    assert np.array_equal(TensorFile(tmp_path / "b.safetensors")["x"], once)
    step = {"F64": 0, "F32": 2**-24, "F16": 2**-11, "BF16": 2**-8, "F8_E4M3": 2**-4, "F8_E5M2": 2**-3}[dtype]
    assert np.all(np.abs(once - values) <= step * np.abs(values) + (2**-10 if dtype.startswith("F8") else 1e-7))


def test_storage_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        theirs = codes.view(dtype).float().numpy()
        assert np.array_equal(fp8_values(name), theirs, equal_nan=True)
        values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
        assert encode(values.numpy(), name) == values.to(dtype).view(torch.uint8).numpy().tobytes()
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert encode(values.numpy(), "BF16") == values.bfloat16().view(torch.uint8).numpy().tobytes()


# -------------------------------------------------------------------------------- names


def _linears(model) -> dict[str, tuple[int, int]]:
    torch = pytest.importorskip("torch")
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _known(prefix: str) -> dict[str, tuple[int, int | None]]:
    return {name.removeprefix(prefix): shape for name, shape in SHAPES.items() if name.startswith(prefix)}


def test_flux_names_are_those_of_the_model() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    ours = {name: shape for name, shape in _known("transformer.").items() if "distilled" not in name}
    assert len(ours) == FLUX_LINEARS == 504
    assert {**ours, "x_embedder": (3072, 64)} == _linears(model)


def test_chroma_names_are_those_of_the_model() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.ChromaTransformer2DModel()
    theirs = _linears(model)
    ours = {**_known("transformer."), "x_embedder": (3072, 64)}
    assert {name: ours.get(name) for name in theirs} == theirs


def test_text_encoder_names_are_those_of_the_models() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    clip_config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    t5_config = transformers.T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        clip, t5 = transformers.CLIPTextModel(clip_config), transformers.T5EncoderModel(t5_config)
    # transformers 5 dropped the `text_model` level that every published file has.
    theirs = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in _linears(clip).items()}
    assert _known("text_encoder.") == theirs
    assert _known("text_encoder_2.") == _linears(t5)


def test_fused_modules_are_covered_once() -> None:
    for source, targets in TRANSFORMER.items():
        if len(targets) > 1:
            edges = [(target.start, target.stop) for target in targets]
            assert edges[0][0] == 0, source
            assert all(a[1] == b[0] for a, b in itertools.pairwise(edges)), source
            assert all(SHAPES[t.module][0] == t.stop - t.start for t in targets), source


# -------------------------------------------------------------------------------- algebra


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _read(tmp_path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> oracle.Reference:
    # A file of its own each time: a reference maps the file that it was read from.
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    save(path, {key: (np.asarray(values), "F32") for key, values in tensors.items()}, metadata or None)
    return oracle.reference(path)


def test_lora_scale_and_slices(tmp_path: Path) -> None:
    down, up = _random(4, 3072), _random(9216, 4)
    name = "lora_unet_double_blocks_3_txt_attn_qkv"
    found = _read(tmp_path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": 3.0})
    whole = 3.0 / 4 * up.astype(np.float64) @ down.astype(np.float64)
    parts = [f"transformer.transformer_blocks.3.attn.add_{leaf}_proj" for leaf in "qkv"]
    assert list(found) == parts
    assert np.allclose(np.concatenate([found[part].dense() for part in parts]), whole, rtol=1e-12)


def test_final_norm_swaps_output_halves_only(tmp_path: Path) -> None:
    down, up, bias = _random(4, 3072), _random(6144, 4), _random(6144)
    name = "final_layer.adaLN_modulation.1"
    found = _read(tmp_path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias})
    shift, scale = np.split(up.astype(np.float64) @ down, 2)
    assert np.allclose(found["transformer.norm_out.linear"].dense(), np.concatenate([scale, shift]))
    assert np.array_equal(found["transformer.norm_out.linear#bias"].dense(), np.roll(bias, 3072))


@pytest.mark.parametrize(
    ("w2", "expected"), [("full", 1.0), ("split", 2.0 / 8)], ids=["both factors full", "w2 decomposed"]
)
def test_lokr_scale_and_rows(tmp_path: Path, w2: str, expected: float) -> None:
    name = "diffusion_model.single_blocks.1.linear1"
    w1, a, b = _random(16, 16), _random(1344, 8), _random(8, 192)
    second = {f"{name}.lokr_w2": a @ b} if w2 == "full" else {f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    found = _read(tmp_path, {f"{name}.lokr_w1": w1, f"{name}.alpha": 2.0, **second})
    whole = expected * np.kron(w1, a.astype(np.float64) @ b)
    got = found["transformer.single_transformer_blocks.1.proj_mlp"]
    assert np.allclose(got.dense(), whole[9216:], rtol=1e-5, atol=1e-5)
    assert oracle.norm(got.terms) == pytest.approx(np.linalg.norm(whole[9216:]), rel=1e-6)


def test_loha(tmp_path: Path) -> None:
    name = "lora_unet_single_blocks_0_modulation_lin"
    factors = {"hada_w1_a": (9216, 4), "hada_w1_b": (4, 3072), "hada_w2_a": (9216, 4), "hada_w2_b": (4, 3072)}
    slots = {key: _random(*shape, seed=i) for i, (key, shape) in enumerate(factors.items())}
    found = _read(tmp_path, {**{f"{name}.{key}": value for key, value in slots.items()}, f"{name}.alpha": 6.0})
    whole = 6 / 4 * (slots["hada_w1_a"] @ slots["hada_w1_b"]) * (slots["hada_w2_a"] @ slots["hada_w2_b"])
    got = found["transformer.single_transformer_blocks.0.norm.linear"].dense()
    assert np.linalg.norm(got - whole) < 1e-5 * np.linalg.norm(whole)


def test_two_contributions_add(tmp_path: Path) -> None:
    names = ("transformer.transformer_blocks.0.attn.to_out.0", "lora_unet_double_blocks_0_img_attn_proj")
    tensors, whole = {}, np.zeros((3072, 3072))
    for seed, (name, alpha) in enumerate(zip(names, (1.0, 5.0), strict=True)):
        down, up = _random(2, 3072, seed=seed), _random(3072, 2, seed=seed)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        whole = whole + alpha / 2 * up.astype(np.float64) @ down
    found = _read(tmp_path, tensors)
    assert np.allclose(found[names[0]].dense(), whole, rtol=1e-12)


ADAPTER = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 2}}
SIMPLE_TUNER = {"transformer.lora_alpha": "6"}


@pytest.mark.parametrize(
    ("metadata", "config", "tensor_alpha", "expected"),
    [
        ({}, None, None, {"to_q": 1.0, "to_k": 1.0}),
        ({}, {"r": 4, "lora_alpha": 8}, None, {"to_q": 2.0, "to_k": 2.0}),
        ({}, {"r": 4, "lora_alpha": 8, "use_rslora": True}, None, {"to_q": 4.0, "to_k": 4.0}),
        (
            {"lora_adapter_metadata": json.dumps(ADAPTER)},
            {"r": 4, "lora_alpha": 1},
            None,
            {"to_q": 0.5, "to_k": 2.0},
        ),
        ({"lora_adapter_metadata": json.dumps(ADAPTER)}, None, 12.0, {"to_q": 3.0, "to_k": 3.0}),
        (SIMPLE_TUNER, None, None, {"to_q": 1.5, "to_k": 1.5}),
    ],
    ids=["rank", "config", "config rslora", "header before config", "tensor first", "plain header entry"],
)
def test_alpha_comes_from(tmp_path, metadata, config, tensor_alpha, expected) -> None:
    tensors = {}
    for leaf in expected:
        path = f"transformer.single_transformer_blocks.7.attn.{leaf}"
        tensors |= {f"{path}.lora_A.weight": _random(4, 3072), f"{path}.lora_B.weight": _random(3072, 4)}
        if tensor_alpha:
            tensors[f"{path}.alpha"] = tensor_alpha
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = _read(tmp_path, tensors, **metadata)
    scales = {module.rpartition(".")[2]: delta.terms[0].scale for module, delta in found.items()}
    assert scales == expected


def test_compare_sees_small_errors_and_zero_modules(tmp_path: Path) -> None:
    down, up = _random(4, 3072), _random(3072, 4)
    key = "transformer.transformer_blocks.0.attn.to_q"
    zero = "transformer.transformer_blocks.0.attn.to_k"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    ours = _read(tmp_path, tensors)
    theirs = _read(tmp_path, {f"{key}.lora_A.weight": down * 2, f"{key}.lora_B.weight": up / 2 * (1 + 1e-4)})
    error = oracle.compare(ours, theirs, 1e-6)
    assert not error
    assert error.errors[key] == pytest.approx(1e-4, rel=1e-2)
    empty = {f"{zero}.lora_A.weight": down, f"{zero}.lora_B.weight": up * 0}
    assert oracle.compare(_read(tmp_path, {**tensors, **empty}), ours)
    full = {f"{zero}.lora_A.weight": down, f"{zero}.lora_B.weight": up}
    assert oracle.compare(_read(tmp_path, {**tensors, **full}), ours).missing == [zero]


def test_unknown_keys_are_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(oracle.UnknownKey):
        _read(tmp_path, {"lora_unet_double_blocks_19_img_attn_qkv.lora_down.weight": _random(1, 3072)})
    with pytest.raises(oracle.UnknownKey):
        _read(tmp_path, {"transformer.transformer_blocks.0.attn.to_q.surprise": _random(1)})


# -------------------------------------------------------------------------------- diffusers

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
TOP_LEVEL = (
    "transformer.x_embedder",
    "transformer.context_embedder",
    "transformer.time_text_embed.",
    "transformer.proj_out",
    "transformer.norm_out.",
)


def _is_top_level(module: str) -> bool:
    return module.startswith(TOP_LEVEL)


def _everything(module: str) -> bool:
    return True


def _nothing(module: str) -> bool:
    return False


SAME_BLOCK = "transformer.transformer_blocks.0.attn."
# Fixture -> (modules that diffusers loses, modules that it gets wrong).
DIFFUSERS = {
    "flux_bare_diffusers_single": (_everything, _nothing),
    "flux_comfy_native_down_up": (_nothing, _nothing),
    "flux_control_lora": (_nothing, lambda module: module == "transformer.norm_out.linear"),
    "flux_diffusers_old_lora_down_up": (_nothing, _nothing),
    "flux_diffusers_peft_mixed_rank_te": (_nothing, _nothing),
    "flux_diffusers_peft_with_alpha": (_nothing, _nothing),
    "flux_fal_kontext": (_nothing, _nothing),
    "flux_fill_x_embedder_384": (_nothing, _nothing),
    "flux_kohya_all_linear": (_is_top_level, _nothing),
    "flux_kohya_clip_partial": (_nothing, _nothing),
    "flux_kohya_split_qkv": (_nothing, _nothing),
    "flux_lora_aitoolkit": (_everything, _nothing),
    "flux_lora_diffusers_no_proj_mlp": (_nothing, _nothing),
    "flux_lora_kohya": (_nothing, _nothing),
    "flux_lora_xlabs": (_nothing, _nothing),
    "flux_mixed_same_block_twice": (
        lambda module: module.startswith(f"{SAME_BLOCK}add_"),
        lambda module: module.startswith(f"{SAME_BLOCK}to_"),
    ),
    "flux_onetrainer_all_linear": (
        lambda module: not module.endswith(ATTENTION) and not _is_top_level(module),
        _nothing,
    ),
    "flux_onetrainer_attn": (_nothing, _nothing),
    "flux_onetrainer_bfl": (_everything, _nothing),
    "flux_peft_named_default": (_nothing, _nothing),
    "flux_xlabs_double_single": (_nothing, _nothing),
}


DIFFUSERS_PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora.down.weight": ".lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
}


def _as_diffusers_reads(state_dict: dict, alphas: dict | None) -> oracle.Reference:
    """What diffusers takes from its own dictionary: keys of a component, alpha beside them, norms set."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    # The kohya converter leaves text encoder keys in diffusers' oldest spelling; the loader respells them.
    text = {key: state_dict[key] for key in state_dict if key.startswith("text_encoder.")}
    text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text)) if text else {}
    result: oracle.Reference = {}
    arrays = {key: value.float().numpy() for key, value in ({**state_dict, **text}).items()}
    for key, values in arrays.items():
        if not key.startswith(("transformer.", "text_encoder.")):
            continue
        module = re.split(r"\.lora[._]", key)[0]
        down = next((suffix for suffix in DIFFUSERS_PAIRS if key.endswith(suffix)), None)
        if down:
            alpha = (alphas or {}).get(f"{module}.alpha", values.shape[0])
            up = arrays[module + DIFFUSERS_PAIRS[down]]
            result[module] = oracle.Delta([oracle.LowRank(values, up, float(alpha) / values.shape[0])])
        elif key.endswith(".lora_B.bias"):
            result[f"{module}#bias"] = oracle.Delta([oracle.Full(values)])
        elif ".lora_" not in key and ".norm_" in key:
            result[f"{key.removesuffix('.weight')}#set"] = oracle.Delta([oracle.Full(values)])
    return result


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_agrees_where_it_is_right(tmp_path: Path, name: str) -> None:
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders import FluxLoraLoaderMixin

    source = oracle.make_file(name, tmp_path / "a.safetensors", seed=3, shrink_rank=64 if "control" in name else 4)
    expected = oracle.reference(source)
    tensors = TensorFile(source)
    given = {key: torch.from_numpy(np.array(tensors[key])) for key in tensors}
    state_dict, alphas = FluxLoraLoaderMixin.lora_state_dict(given, return_alphas=True)
    found = {module: delta for module, delta in _as_diffusers_reads(state_dict, alphas).items() if module in expected}
    comparison = oracle.compare(expected, found, 1e-6)
    lost, wrong = DIFFUSERS[name]
    assert set(comparison.missing) == {module for module in expected if lost(module)}
    assert set(comparison.wrong) == {module for module in expected if wrong(module)}, str(comparison)
    assert len(comparison.errors) + len(comparison.missing) == len(expected)


@pytest.mark.parametrize("name", ["flux_kohya_diffusers_names", "flux_peft_base_model_attn"])
def test_diffusers_refuses(tmp_path: Path, name: str) -> None:
    """With the table above this says something about every plain LoRA fixture of FLUX."""
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders import FluxLoraLoaderMixin

    tensors = TensorFile(oracle.make_file(name, tmp_path / "a.safetensors", shrink_rank=8))
    with pytest.raises((KeyError, ValueError)):
        FluxLoraLoaderMixin.lora_state_dict({key: torch.from_numpy(np.array(tensors[key])) for key in tensors})
