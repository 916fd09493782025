"""diffusers itself loads what lorafmt writes: every layer is there, with the right weights and scale.

The models have their published size and no memory: weights are one zero seen through stride 0.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lorafmt
import oracle
from checks import PLAIN
from generate import random_file
from test_fixtures import make

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from diffusers.loaders import FluxLoraLoaderMixin  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from diffusers_loads import hollow  # noqa: E402

INPUT_WIDTH = {"flux_control_lora": 128, "flux_fill_x_embedder_384": 384}
# Loaded at full size; of the others a few blocks, since adding layers is what takes the time.
WHOLE = ("flux_kohya_all_linear",)


def _flux(width: int = 64) -> torch.nn.Module:
    return hollow(lambda: diffusers.FluxTransformer2DModel(in_channels=width, out_channels=64, guidance_embeds=True))


def _clip() -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=49408
    )
    return hollow(lambda: transformers.CLIPTextModel(config))


class Pipeline(FluxLoraLoaderMixin):
    """The part of FluxPipeline that loads LoRAs."""

    hf_device_map = None
    lora_scale = 1.0

    def __init__(self, transformer: torch.nn.Module, text_encoder: torch.nn.Module | None) -> None:
        self.transformer, self.text_encoder = transformer, text_encoder
        self.components: dict[str, torch.nn.Module] = {}


@pytest.fixture(scope="module")
def shared_flux() -> torch.nn.Module:
    return _flux()


@pytest.fixture
def flux(shared_flux: torch.nn.Module) -> Iterator[torch.nn.Module]:
    yield shared_flux
    if getattr(shared_flux, "peft_config", None):
        shared_flux.unload_lora()
    gc.collect()


def _loaded(component: str, model: torch.nn.Module) -> oracle.Reference:
    """What the injected layers compute, as the oracle's kind of deltas."""
    result: oracle.Reference = {}
    for name, layer in model.named_modules():
        if not getattr(layer, "lora_A", None):
            continue
        ((adapter, scale),) = layer.scaling.items()
        assert layer.active_adapters == [adapter]
        assert not any(parameter.is_meta for parameter in layer.parameters()), f"{name} was left without values"
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if component == "text_encoder":
            name = f"text_model.{name.removeprefix('text_model.')}"
        module = f"{component}.{name}"
        result[module] = oracle.Delta([oracle.LowRank(_numpy(down), _numpy(up), scale)])
        if layer.lora_B[adapter].bias is not None:
            result[f"{module}#bias"] = oracle.Delta([oracle.Full(_numpy(layer.lora_B[adapter].bias), scale)])
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter].weight
            result[f"{module}#magnitude"] = oracle.Delta([oracle.Full(_numpy(magnitude))])
    return result


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def _load(path: Path, transformer: torch.nn.Module, caplog: pytest.LogCaptureFixture) -> oracle.Reference:
    """`load_lora_weights` as users call it; nothing may be reported as missing or unexpected."""
    state_dict = load_file(path)
    has_clip = any(key.startswith("text_encoder.") for key in state_dict)
    pipeline = Pipeline(transformer, _clip() if has_clip else None)
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        pipeline.load_lora_weights(state_dict)
    finally:
        logger.removeHandler(caplog.handler)
    assert [r.message for r in caplog.records if "keys found in the model" in r.message] == []
    found = _loaded("transformer", transformer)
    return {**found, **(_loaded("text_encoder", pipeline.text_encoder) if has_clip else {})}


def _assert_loads(source: Path, folder: Path, transformer: torch.nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    target = folder / "out.safetensors"
    lorafmt.convert(source, target, to="diffusers")
    # diffusers has no place for T5.
    expected = {m: d for m, d in oracle.reference(source).items() if not m.startswith("text_encoder_2.")}
    found = _load(target, transformer, caplog)
    for module in [module for module in expected if module.endswith("#set")]:
        weight = transformer.get_submodule(module.removeprefix("transformer.").removesuffix("#set")).weight
        found[module] = oracle.Delta([oracle.Full(_numpy(weight))])
    comparison = oracle.compare(expected, found, 1e-6)
    assert comparison, str(comparison)
    assert comparison.errors.keys() == expected.keys()


@pytest.mark.parametrize("name", [name for name in PLAIN if name.startswith("flux") and name not in INPUT_WIDTH])
def test_fixture_loads(tmp_path: Path, name: str, flux: torch.nn.Module, caplog) -> None:
    _assert_loads(make(name, tmp_path / "in", whole=name in WHOLE), tmp_path, flux, caplog)


@pytest.mark.parametrize(("name", "width"), INPUT_WIDTH.items())
def test_control_and_fill_load(tmp_path: Path, name: str, width: int, caplog) -> None:
    """Their first layer is wider; the norms of control LoRAs are set in the model."""
    _assert_loads(make(name, tmp_path / "in", whole=False), tmp_path, _flux(width), caplog)


def test_chroma_loads(tmp_path: Path, caplog) -> None:
    model = hollow(diffusers.ChromaTransformer2DModel)
    _assert_loads(make("chroma_kohya_guidance_layer", tmp_path / "in"), tmp_path, model, caplog)


@pytest.mark.parametrize("kind", ["lora", "dora", "bias"])
@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "onetrainer", "diffusers"])
def test_random_file_loads(tmp_path: Path, spelling: str, kind: str, flux: torch.nn.Module, caplog) -> None:
    """With CLIP and T5 parts beside the transformer's, DoRA magnitudes, and biases."""
    source = random_file(tmp_path / "in" / "lora.safetensors", 21, spelling, kind=kind)
    _assert_loads(source, tmp_path, flux, caplog)


def test_a_lone_bias_does_not_break_the_others(tmp_path: Path, flux: torch.nn.Module, caplog) -> None:
    """One `diff_b` makes PEFT give every layer a bias, and absent ones are left without memory."""
    rng = np.random.default_rng(0)
    tensors = {}
    for number in (1, 2):
        name = f"diffusion_model.double_blocks.{number}.img_attn.proj"
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, 3072), np.float32), "F32"
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((3072, 2), np.float32), "F32"
    tensors[f"{name}.diff_b"] = rng.standard_normal(3072, np.float32), "F32"
    source = tmp_path / "in.safetensors"
    oracle.save(source, tensors)
    target = tmp_path / "out.safetensors"
    lorafmt.convert(source, target)
    comparison = oracle.compare(oracle.reference(source), _load(target, flux, caplog), 1e-6)
    assert comparison, str(comparison)


@pytest.mark.parametrize("name", ["flux_kohya_all_linear", "flux_peft_base_model_attn", "flux_fal_kontext"])
def test_peft_folder_loads_in_peft(tmp_path: Path, name: str, flux: torch.nn.Module) -> None:
    """adapter_config.json must not confuse the final `proj_out` with those of the single blocks."""
    from peft import PeftModel

    source = make(name, tmp_path / "in", whole=False)
    lorafmt.convert(source, tmp_path / "adapter", to="peft")
    model = PeftModel.from_pretrained(flux, tmp_path / "adapter")
    found = _loaded("transformer", model.get_base_model())
    model.unload()
    comparison = oracle.compare(oracle.reference(source), found, 1e-6)
    assert comparison, str(comparison)


# -------------------------------------------------------------------------------- facts


def _pair(path: str, width: int, suffixes: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")) -> dict:
    return {path + suffixes[0]: torch.ones(2, width), path + suffixes[1]: torch.ones(width, 2)}


PARTS = {
    **_pair("transformer.transformer_blocks.0.attn.to_q", 3072),
    **_pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 768),
}


def test_diffusers_passes_over_text_encoder_2() -> None:
    """Why T5 is written as `text_encoder_2...lora_A.weight`: diffusers leaves everything else as it was."""
    t5 = _pair("text_encoder_2.encoder.block.3.layer.0.SelfAttention.q", 4096)
    state_dict, alphas = FluxLoraLoaderMixin.lora_state_dict({**PARTS, **t5}, return_alphas=True)
    assert set(PARTS) <= set(state_dict)
    assert all(torch.equal(state_dict[key], value) for key, value in PARTS.items())
    assert not alphas


def test_diffusers_drops_clip_beside_kohya_t5() -> None:
    """And why not under its kohya name: one `.lora_down.weight` makes the whole file a kohya file."""
    name = "lora_te3_encoder_block_3_layer_0_SelfAttention_q"
    t5 = _pair(name, 4096, (".lora_down.weight", ".lora_up.weight"))
    state_dict = FluxLoraLoaderMixin.lora_state_dict({**PARTS, **t5})
    assert sorted(state_dict) == sorted(key for key in PARTS if key.startswith("transformer."))
