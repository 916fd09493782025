"""Checkpoints that are written here are bases for native files: at FLUX.1's true width, with one block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

import lorafmt
from lorafmt import runtime
from lorafmt.runtime import writing

BLOCK = "single_transformer_blocks.0"
SHAPES = {"attn.to_q": (3072, 3072), "proj_mlp": (12288, 3072), "proj_out": (3072, 15360)}


def wide() -> nn.Module:
    """One single block of FLUX.1, its memory as it comes."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    return model.to(torch.bfloat16).to_empty(device="cpu")


def adapter() -> dict[str, Tensor]:
    return tiny.lora(1, shapes={f"{BLOCK}.{name}": shape for name, shape in SHAPES.items()})


def ones(maker: Any, job: Any) -> dict[str, Tensor]:
    """In place of the numbers of a layer; names, types and shapes are the real ones."""
    return {
        key.rpartition(".")[2]: torch.ones(shape, dtype=dtype)
        for key, (dtype, shape, _) in writing.Maker.layer(maker, job).items()
    }


def test_native_files_are_made_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.Maker, "_quantized", ones)
    path = runtime.quantize_checkpoint(wide(), tmp_path / "base.safetensors", rank=16, modulation=False)
    base = lorafmt.Base.open(path)
    assert (base.family, base.precision, base.rank) == ("flux1", "int4", 16)
    report = lorafmt.convert(adapter(), tmp_path / "native.safetensors", to="nunchaku", base=path)
    assert report.tensors.used == 6 and not report.warnings
    back = lorafmt.open(tmp_path / "native.safetensors", base=path)
    assert {back[f"{BLOCK}.{name}"].shape for name in SHAPES} == set(SHAPES.values())
    down, up = (adapter()[f"transformer.{BLOCK}.attn.to_q.lora_{side}.weight"].double() for side in "AB")
    want = (up @ down).numpy()
    assert np.linalg.norm(back[f"{BLOCK}.attn.to_q"].delta() - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.slow
def test_native_files_load_into_the_model_that_it_makes(tmp_path: Path) -> None:
    """Half a minute: everything is computed. A native file and the adapter it is made of give the same buffers."""
    model = wide()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(False).copy_(tiny.normal(number, *parameter.shape) / 50)
    path = runtime.quantize_checkpoint(model, tmp_path / "base.safetensors", rank=16)
    lorafmt.convert(adapter(), tmp_path / "native.safetensors", to="nunchaku", base=path)
    made = runtime.load_quantized(None, path, ranks=32)
    layer = made.get_submodule(f"{BLOCK}.proj_out")
    ranks = layer.slots["base"].ranks
    x = tiny.normal(5, 8, 15360).bfloat16()
    weight = (
        layer.wq.double() * layer.wscale.double().unsqueeze(1)
        + layer.up[:, ranks].double() @ layer.down[ranks].double()
    )
    assert tiny.distance(weight, model.get_submodule(f"{BLOCK}.proj_out").weight) < 0.12
    with torch.no_grad():
        assert tiny.distance(layer(x), x.double() @ weight.t() + layer.bias.double()) < 0.01
    made.update_lora_params(adapter())
    one = {name: buffer.clone() for name, buffer in made.named_buffers()}
    made.update_lora_params(tmp_path / "native.safetensors")
    assert all(torch.equal(one[name], buffer) for name, buffer in made.named_buffers())


def command(*words: object, status: int = 0) -> dict[str, Any]:
    """What the command says as JSON."""
    line = [sys.executable, "-m", "lorafmt", "quantize", *map(str, words), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def test_the_command_writes_and_refuses(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    out = tmp_path / "out.safetensors"
    asked = (tmp_path / "model", "-o", out, "--rank", 16)
    planned = command(*asked, "--dry-run")
    assert planned["dry_run"] and not out.exists()
    said = command(*asked)
    assert said["target"]["bytes"] == out.stat().st_size and 0 < planned["target"]["bytes"] < out.stat().st_size
    assert (said["layers"], said["rank"], said["target"]["dialect"]) == (planned["layers"], 16, "nunchaku")
    content = out.read_bytes()
    assert command(*asked, status=2)["error"]["code"] == "output-exists"
    assert command(tmp_path / "none", "-o", out, "--force", status=2)["error"]["code"] in ("io", "not-found")
    assert command(tmp_path / "model", "-o", tmp_path / "no/out", status=2)["error"]["code"] in ("io", "not-found")
    assert command(*asked[:3], "--rank", 20, "--force", status=2)["error"]["code"] == "invalid-argument"
    assert out.read_bytes() == content
    command(*asked, "--force", "--no-modulation")
    assert tiny.run(runtime.load_quantized(None, out, family=tiny.register())).isfinite().all()


def test_the_command_smooths_by_maxima(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    name = next(n for n, m in model.named_modules() if n.endswith("attn.to_q") and isinstance(m, nn.Linear))
    maxima = {name: tiny.normal(3, model.get_submodule(name).in_features).abs() + 0.1}
    save_file(maxima, tmp_path / "maxima.safetensors")
    out = tmp_path / "out.safetensors"
    asked = (tmp_path / "model", "-o", out, "--rank", 16, "--maxima", tmp_path / "maxima.safetensors")
    assert command(*asked, "--alpha", 0.25)["smoothed"] == 1
    direct = runtime.quantize_checkpoint(model, tmp_path / "direct.safetensors", rank=16, maxima=maxima, alpha=0.25)
    assert load_file(out).keys() == load_file(direct).keys()
    assert all(torch.equal(value, load_file(direct)[key]) for key, value in load_file(out).items())
    save_file({"nothing.like.it": torch.ones(4)}, tmp_path / "maxima.safetensors")
    error = command(*asked, "--force", status=2)["error"]
    assert (error["code"], error["key"]) == ("invalid-argument", "nothing.like.it")
    save_file({name: torch.ones(4)}, tmp_path / "maxima.safetensors")
    error = command(*asked, "--dry-run", status=2)["error"]
    assert (error["code"], error["key"]) == ("invalid-argument", name)


def test_the_line_of_the_runtime() -> None:
    done = subprocess.run([sys.executable, "-m", "lorafmt.runtime"], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout
