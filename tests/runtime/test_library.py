"""Which path is on and why: without a GPU it is torch, and a library is judged before it is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafmt.runtime import library

GOOD = b"\x7fELF....lorafmt-cuda abi=%d arches=80,86,89,90a,120 cuda=13.0.88 torch=2.11;...." % library.ABI


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an H100, as far as torch says, and a library's file."""
    path = tmp_path / "lorafmt_cuda.so"
    path.write_bytes(GOOD)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "driver_version", lambda: 13000)
    monkeypatch.setenv(library.VARIABLE, str(path))
    return path


def test_importing_lorafmt_imports_no_torch() -> None:
    code = "import sys, lorafmt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_status_says_why_in_one_line() -> None:
    from lorafmt import runtime

    line = runtime.status()
    assert "torch sees no CUDA device" in line and "\n" not in line


def test_a_good_library_is_read_without_loading(gpu: Path) -> None:
    built = library.Built.read(gpu)
    assert built == library.Built(library.ABI, ("80", "86", "89", "90a", "120"), "13.0.88", "2.11")
    assert library._refusal(library.library()) is None


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((8, 0), True),
        ((8, 7), True),
        ((9, 0), True),
        ((9, 1), False),
        ((10, 0), False),
        ((12, 1), True),
        ((7, 5), False),
    ],
)
def test_code_runs_on_its_major_and_the_letter_a_on_one_chip(capability: tuple[int, int], runs: bool) -> None:
    assert library.Built(1, ("80", "86", "89", "90a", "120"), "13.0.88", "2.11").runs_on(*capability) is runs


def test_refusals_name_the_reason(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        return library._refusal(library.library()) or ""

    gpu.write_bytes(GOOD.replace(b"abi=%d" % library.ABI, b"abi=999"))
    assert "signatures of version 999" in reason()
    gpu.write_bytes(GOOD.replace(b"torch=2.11", b"torch=99.1"))
    assert "needs torch 99.1" in reason()
    gpu.write_bytes(GOOD.replace(b"90a,", b""))
    assert "no code for sm_90 (H100)" in reason()
    gpu.write_bytes(GOOD)
    monkeypatch.setattr(library, "driver_version", lambda: 12080)
    assert "the driver is for 12.8" in reason()
    gpu.write_bytes(b"something else")
    assert "not a library of lorafmt" in reason()
    gpu.unlink()
    assert "does not exist" in reason()
    monkeypatch.setenv(library.VARIABLE, "")
    assert "cuda/build.py" in reason()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in reason()


def test_a_library_that_does_not_load_leaves_torch(gpu: Path) -> None:
    route = library._choose()
    assert not route.kernels and "does not load" in route.line
