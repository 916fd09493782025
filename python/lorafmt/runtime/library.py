"""Finding and loading the compiled kernels; without them everything runs on torch.

The library is one file of data beside this module. It registers CUDA implementations of the operators of
:mod:`lorafmt.runtime.ops` and contains no Python, so that one file fits every Python and every torch from 2.11 on. What
it was built for stands in it as a line of text, which is read before it is loaded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

#: Version of the operators' signatures; the same number stands in ``cuda/csrc/binding.cpp``.
ABI = 1

#: Names another library; empty means none at all.
VARIABLE = "LORAFMT_CUDA_LIBRARY"

_MARK = re.compile(rb"lorafmt-cuda abi=(\d+) arches=([0-9a,]+) cuda=([0-9.]+) torch=([0-9.]+);")


@dataclass(frozen=True)
class Built:
    """What a library says of itself."""

    abi: int
    arches: tuple[str, ...]
    cuda: str
    torch: str

    @classmethod
    def read(cls, path: Path) -> Built | None:
        """The line in the file at ``path``; None where there is none."""
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _MARK.search(data)
            fields = [field.decode() for field in found.groups()] if found else None
        if fields is None:
            return None
        abi, arches, cuda, target = fields
        return cls(int(abi), tuple(arches.split(",")), cuda, target)

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether it has code for a compute capability: of the same major and no newer, or the very one (``a``)."""
        return any(_fits(arch, major, minor) for arch in self.arches)


def _fits(arch: str, major: int, minor: int) -> bool:
    exact = arch.endswith("a")
    number = int(arch.rstrip("a"))
    return number // 10 == major and (number % 10 == minor if exact else number % 10 <= minor)


@dataclass(frozen=True)
class Route:
    """Which path is on: ``kernels`` or ``torch``, and the line that :func:`status` gives."""

    kernels: bool
    line: str


def library() -> Path | None:
    """The library's file: the one that the environment names, or the one beside this module; None without."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    path = Path(__file__).with_name("lorafmt_cuda.so")
    return path if path.exists() else None


def _version(text: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def driver_version() -> int:
    """The newest CUDA that the driver runs, 13000 for 13.0; 0 where there is no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def _written(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _refusal(path: Path | None) -> str | None:
    """Why the kernels cannot be used; None if they can. Loads nothing."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    if path is None:
        return "lorafmt_cuda.so is not installed; cuda/build.py makes it"
    if not path.exists():
        return f"{path} does not exist"
    built = Built.read(path)
    if built is None:
        return f"{path} is not a library of lorafmt"
    if built.abi != ABI:
        return f"{path} has signatures of version {built.abi}, this package has {ABI}; build it again"
    if _version(torch.__version__) < _version(built.torch):
        return f"{path} needs torch {built.torch} or newer, this is {torch.__version__}"
    if driver_version() // 1000 < _version(built.cuda)[0]:
        return f"{path} was made with CUDA {built.cuda}, the driver is for {_written(driver_version())}; update it"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not built.runs_on(major, minor):
            name = torch.cuda.get_device_name(index)
            return f"no code for sm_{major}{minor} ({name}) in {path}, which has sm_{', sm_'.join(built.arches)}"
    return None


def _choose() -> Route:
    path = library()
    reason = _refusal(path)
    if reason is None:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            reason = f"{path} does not load: {error}"
    if reason is None:
        built = Built.read(path)  # type: ignore[arg-type]
        names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
        return Route(True, f"kernels of {path} (CUDA {built.cuda}) on {', '.join(names)}")  # type: ignore[union-attr]
    return Route(False, f"torch {torch.__version__} without kernels: {reason}")


_route: Route | None = None


def load() -> bool:
    """Loads the kernels once, if they can be used; whether they are on."""
    global _route
    if _route is None:
        _route = _choose()
    return _route.kernels


def status() -> str:
    """Which path computes on CUDA and why, in one line."""
    from . import ops  # noqa: F401  (defines the operators, then loads)

    load()
    assert _route is not None
    return _route.line
