"""How Nunchaku's FLUX.1 checkpoints call what diffusers' model has. Read in nunchaku (``models/transformers``)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stored:
    """A quantized layer of a checkpoint."""

    name: str
    #: Behind GELU: in int4 its inputs are shifted and without a sign.
    shifted: bool = False


@dataclass(frozen=True)
class Layer:
    """Layers of diffusers' block, stacked by outputs, and those of the checkpoint, side by side by inputs."""

    modules: tuple[str, ...]
    stored: tuple[Stored, ...]
    #: The attention's output, whose inputs may have been divided already, and the layers that its values come from.
    output: bool = False
    values: bool = False


def _layer(stored: str, *modules: str, shifted: bool = False, output: bool = False, values: bool = False) -> Layer:
    return Layer(modules, (Stored(stored, shifted),), output, values)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

DOUBLE = (
    _layer("qkv_proj", *_QKV, values=True),
    _layer("qkv_proj_context", *_ADDED, values=True),
    _layer("out_proj", "attn.to_out.0", output=True),
    _layer("out_proj_context", "attn.to_add_out", output=True),
    _layer("mlp_fc1", "ff.net.0.proj"),
    _layer("mlp_fc2", "ff.net.2", shifted=True),
    _layer("mlp_context_fc1", "ff_context.net.0.proj"),
    _layer("mlp_context_fc2", "ff_context.net.2", shifted=True),
)
SINGLE = (
    _layer("qkv_proj", *_QKV, values=True),
    _layer("mlp_fc1", "proj_mlp"),
    # Their outputs are added; the bias of proj_out is out_proj's.
    Layer(("proj_out",), (Stored("out_proj"), Stored("mlp_fc2", shifted=True)), output=True),
)
BLOCKS = {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}

#: Modulation layers and the number of parts whose rows are interleaved.
MODULATION = {
    "transformer_blocks": {"norm1.linear": 6, "norm1_context.linear": 6},
    "single_transformer_blocks": {"norm.linear": 3},
}

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

#: Names of the second generation of classes, under which some checkpoints are.
_SECOND = {
    "transformer_blocks": {
        "attn.to_qkv": "qkv_proj",
        "attn.add_qkv_proj": "qkv_proj_context",
        "attn.to_out.0": "out_proj",
        "attn.to_add_out": "out_proj_context",
        "ff.net.0.proj": "mlp_fc1",
        "ff.net.2": "mlp_fc2",
        "ff_context.net.0.proj": "mlp_context_fc1",
        "ff_context.net.2": "mlp_context_fc2",
    },
    "single_transformer_blocks": {"attn.to_qkv": "qkv_proj", "attn.to_out": "out_proj"},
}
_SECOND_SUFFIXES = {
    "proj_down": "lora_down",
    "proj_up": "lora_up",
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
}

BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")


def first_generation(key: str) -> str:
    """A tensor's name as the first generation has it; those of norms are diffusers' in both."""
    found = BLOCK.fullmatch(key)
    if found is None:
        return key
    kind, number, local = found.groups()
    layer, _, suffix = local.rpartition(".")
    if layer in _NORMS:
        layer = f"attn.{layer}"
    layer = _SECOND[kind].get(layer, layer)
    return f"{kind}.{number}.{layer}.{_SECOND_SUFFIXES.get(suffix, suffix)}"
