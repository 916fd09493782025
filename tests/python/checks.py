"""What every conversion must satisfy, and what each written dialect can hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lorafmt
import oracle
from tensorfile import TensorFile

WRITTEN = ("diffusers", "peft", "kohya", "comfyui", "bfl", "xlabs", "onetrainer", "aitoolkit")
LOKR = ("flux_bfl_lokr_consistent", "flux_kohya_lokr", "flux_lycoris_lokr")
DETECT_ONLY = ("flux_lokr_bfl",)
ALL = tuple(sorted(path.stem for path in oracle.FIXTURES.glob("*.json")))
PLAIN = tuple(name for name in ALL if name not in LOKR + DETECT_ONLY)

# Typical rounding error (root mean square) of one rounding to nearest, relative: a second one shows.
ONE_ROUNDING = {"F32": 1e-6, "F16": 2.0**-12, "BF16": 2.0**-9}

DIFFUSERS_KEY = re.compile(
    r"(transformer|text_encoder|text_encoder_2)\..+"
    r"(\.lora_A\.weight|\.lora_B\.weight|\.lora_B\.bias|\.norm_(added_)?[qk]\.weight|\.lora_magnitude_vector)"
)
XLABS = re.compile(
    r"transformer\.(transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_out))"
)


def convert(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    """Convert to a new file, check the report's own arithmetic, and give the report."""
    report = lorafmt.convert(source, target, **options).to_dict()
    json.dumps(report)
    counts = report["tensors"]
    assert counts["in"] == len(TensorFile(oracle.locate(source)[0]))
    assert counts["used"] + counts["carried"] + counts["dropped"] + counts["unknown"] == counts["in"]
    assert counts["unknown"] == 0
    return report


def needs_rounding(delta: oracle.Delta) -> bool:
    """Whether a scale has to be multiplied into the factors that is not a power of two."""
    return any(math.frexp(getattr(term, "scale", 1.0))[0] != 0.5 for term in delta.terms)


def assert_equal(
    expected: oracle.Reference, target: Path, dtype: str = "F32", *, tolerance: float | None = None
) -> None:
    """The written file's deltas are the source's: exactly where no scale was folded, else to one rounding.

    A `tolerance` of one's own is for results that were rounded more than once.
    """
    limit = ONE_ROUNDING[dtype] if tolerance is None else tolerance
    comparison = oracle.compare(expected, oracle.reference(target), limit)
    assert comparison, str(comparison)
    if tolerance is None:
        spared = [module for module, delta in expected.items() if not needs_rounding(delta)]
        # Half precision is not exact under powers of two: small values become subnormal.
        exact = 1e-6 if dtype == "F16" else 1e-12
        off = {m: comparison.errors[m] for m in spared if comparison.errors.get(m, 0.0) > exact}
        assert not off, f"{len(off)} modules rounded without need, such as {list(off.items())[:3]}"


def must_hold(dialect: str, module: str) -> bool:
    """Whether a dialect has a place for a plain LoRA file's part; where this is false it may refuse."""
    if dialect == "xlabs":
        # Text encoders have no place in such a file and do no harm there: they are carried along.
        return bool(XLABS.fullmatch(module)) or module.startswith("text_encoder")
    if module.startswith("text_encoder"):
        return dialect in ("diffusers", "kohya", "comfyui", "onetrainer")
    if "#" in module:
        return dialect in ("diffusers", "comfyui", "bfl")
    if "distilled_guidance_layer" in module:
        return dialect in ("diffusers", "kohya", "comfyui")
    return True


def target_path(folder: Path, dialect: str) -> Path:
    """A PEFT adapter is a folder; everything else one file."""
    return folder / dialect if dialect == "peft" else folder / f"{dialect}.safetensors"
