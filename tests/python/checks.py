"""What every conversion must satisfy, and what each written dialect can hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lorafmt
import oracle
from native import Base, Native
from oracle import Reference
from tensorfile import TensorFile

WRITTEN = ("diffusers", "peft", "kohya", "comfyui", "bfl", "xlabs", "onetrainer", "aitoolkit")
LOKR = ("flux_bfl_lokr_consistent", "flux_kohya_lokr", "flux_lycoris_lokr")
DETECT_ONLY = ("flux_lokr_bfl",)
EVERY = tuple(sorted(path.stem for path in oracle.FIXTURES.glob("*.json")))
# Those of the families whose names are written by hand in `flux_map`.
ALL = tuple(name for name in EVERY if oracle.fixture(name)["family"] in ("flux1", "chroma"))
PLAIN = tuple(name for name in ALL if name not in LOKR + DETECT_ONLY)

# Typical rounding error (root mean square) of one rounding to nearest, relative: a second one shows.
ONE_ROUNDING = {"F32": 1e-6, "F16": 2.0**-12, "BF16": 2.0**-9}
# In a native file both factors may have to be rounded: the base decides the type, and scales are folded.
NATIVE_ROUNDING = {dtype: 1.5 * error for dtype, error in ONE_ROUNDING.items()}

# How the ranks of several adapters follow each other in a native file.
RANK_LAYOUTS = ("aligned", "packed")

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


def transformer_only(reference: oracle.Reference) -> oracle.Reference:
    return {module: delta for module, delta in reference.items() if module.startswith("transformer.")}


def assert_native(expected: Reference, target: Path, base: Path | Base, *, roundings: int = 1) -> Reference:
    """The native file is sound beside its base and adds the expected deltas; what it adds is returned.

    Every factor may be rounded once into the type it is stored in. Text encoders may be carried; if they are, they
    are held to their deltas as well.
    """
    native = Native(target, base)
    deltas, types = native.deltas(), native.types()
    wanted = {module: delta for module, delta in expected.items() if not _is_text(module) or module in deltas}
    comparison = oracle.compare(wanted, deltas, math.inf)
    limits = {module: roundings * NATIVE_ROUNDING[types.get(module, "BF16")] for module in comparison.errors}
    wrong = {module: error for module, error in comparison.errors.items() if not error <= limits[module]}
    assert comparison and not wrong, f"{comparison}; wrong: {wrong}"
    return deltas


Inputs = list[tuple[Path, float]]
"""Adapters with strengths."""


def deltas_of(inputs: Inputs, base: Path | None = None) -> Reference:
    """What the inputs do together; `base` is for those that are native files themselves."""

    def meaning(path: Path) -> Reference:
        native = any(key.endswith(".lora_down") for key in TensorFile(oracle.locate(path)[0]))
        return Native(path, base).deltas() if native and base else oracle.reference(path)

    return oracle.mixed((meaning(path), strength) for path, strength in inputs)


def to_native(source: Path, target: Path, base: Path, **options: Any) -> Reference:
    """Convert, hold the result to the input, and give what it adds."""
    convert(source, target, to="nunchaku", base=base, **options)
    return assert_native(oracle.reference(source), target, base)


def native_of(inputs: Inputs, target: Path, base: Path) -> None:
    """One input at full strength is a conversion, everything else a composition."""
    if len(inputs) == 1 and inputs[0][1] == 1.0:
        convert(inputs[0][0], target, to="nunchaku", base=base)
    else:
        lorafmt.compose(inputs, target, to="nunchaku", base=base)


def right_or_refused(
    inputs: Inputs, target: Path, base: Path, codes: tuple[str, ...] = ()
) -> lorafmt.LorafmtError | None:
    """The right deltas, or an error of one of these codes (any, if none are given) that leaves nothing behind."""
    try:
        native_of(inputs, target, base)
    except lorafmt.LorafmtError as error:
        assert error.code in codes if codes else error.code
        assert error.hint and not target.exists()
        return error
    assert_native(deltas_of(inputs, base), target, base, roundings=2)
    return None


def _is_text(module: str) -> bool:
    return module.startswith("text_encoder")


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
