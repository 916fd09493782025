"""Builds ``lorafmt_cuda.so``: needs nvcc 13, g++ and the header files of torch 2.11 or newer. No GPU, no driver.

    pip install "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]"     # if there is no CUDA: the compiler is on PyPI
    python cuda/build.py                                       # into python/lorafmt/runtime

Units are compiled side by side, each for the chips of the table. The result links to stubs of torch's libraries that
only carry their names, so torch itself is needed for its headers alone; CUDA's runtime is linked in.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
TARGET = HERE.parent / "python" / "lorafmt" / "runtime" / "lorafmt_cuda.so"

#: Chips that get code: Ampere, Ada, Hopper, Blackwell. Code for sm_80 runs on every 8.x, code for 90a on 9.0 only.
ARCHES = ("80", "86", "89", "90a", "120")

#: Unit -> the chips it is for; None is all of them.
UNITS: dict[str, tuple[str, ...] | None] = {
    "prologue.cu": None,
    "prologue_cluster.cu": ("90a",),
    "gemm_mma.cu": None,
    "gemm_wgmma.cu": ("90a",),
}

#: Libraries that torch has loaded already; the result names them so that its symbols are found there.
TORCH_LIBRARIES = ("torch_cpu", "torch_cuda")

#: The oldest torch that loads the result, as torch writes it in TORCH_TARGET_VERSION.
TORCH_TARGET = "0x020b000000000000"


class BuildError(Exception):
    """Something that the build needs is missing, or a compiler failed."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and the folders of its headers and libraries."""

    nvcc: Path
    version: str

    @property
    def root(self) -> Path:
        return self.nvcc.parent.parent

    def library_folder(self) -> Path:
        for name in ("lib64", "lib"):
            if (self.root / name / "libcudart_static.a").exists():
                return self.root / name
        raise BuildError(f"no libcudart_static.a beside {self.nvcc}: pip install nvidia-cuda-runtime")


def _candidates() -> list[Path]:
    """Where nvcc may be: CUDA_HOME, packages of PyPI, the path, the usual folder."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    roots = [Path(home) for home in homes if home]
    roots += [Path(folder) / "nvidia" / "cu13" for folder in (*sys.path, sysconfig.get_path("purelib")) if folder]
    found = [root / "bin" / "nvcc" for root in roots]
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(Path(on_path).resolve())
    return [*found, Path("/usr/local/cuda/bin/nvcc")]


def find_toolkit() -> Toolkit:
    """The first nvcc of version 13 or newer."""
    seen = []
    for nvcc in _candidates():
        if not nvcc.exists():
            continue
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"V(\d+\.\d+\.\d+)", text)
        if version and int(version[1].split(".")[0]) >= 13:
            return Toolkit(nvcc, version[1])
        seen.append(f"{nvcc} ({version[1] if version else 'does not run'})")
    raise BuildError(f"no nvcc 13: pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]'; found {seen or 'none'}")


def torch_headers() -> Path:
    """The header files of the installed torch; torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed; its header files are needed")
    return Path(spec.origin).parent / "include"


@dataclass
class Result:
    """The library, and what the compiler said about the kernels."""

    library: Path
    seconds: float
    log: str
    toolkit: Toolkit
    arches: tuple[str, ...] = field(default=ARCHES)


def _run(command: list[str | Path]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _compile(toolkit: Toolkit, unit: str, arches: tuple[str, ...], folder: Path) -> str:
    chips = tuple(arch for arch in arches if UNITS[unit] is None or arch in UNITS[unit])
    code: list[str | Path] = []
    if not chips:
        # The symbols are needed all the same; there is no code behind them.
        code = ["-DLORAFMT_NO_CODE", "-gencode", f"arch=compute_{arches[0]},code=sm_{arches[0]}"]
    for arch in chips:
        code += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    flags: list[str | Path] = ["-c", "-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return _run([toolkit.nvcc, *flags, *code, SOURCES / unit, "-o", folder / f"{unit}.o"])


def _bind(toolkit: Toolkit, arches: tuple[str, ...], headers: Path, folder: Path) -> str:
    marks = [f'-DLORAFMT_ARCHES="{",".join(arches)}"', f'-DLORAFMT_CUDA_VERSION="{toolkit.version}"']
    flags = ["-c", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA"]
    paths = [f"-I{headers}", f"-I{toolkit.root / 'include'}"]
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    return _run(["g++", *flags, target, *marks, *paths, SOURCES / "binding.cpp", "-o", folder / "binding.cpp.o"])


def _link(toolkit: Toolkit, folder: Path, library: Path) -> str:
    for name in TORCH_LIBRARIES:
        stub = ["g++", "-shared", "-x", "c++", "/dev/null", "-o", folder / f"lib{name}.so", f"-Wl,-soname,lib{name}.so"]
        _run(stub)
    objects = sorted(folder.glob("*.o"))
    torch = [f"-L{folder}", "-Wl,--no-as-needed", *(f"-l{name}" for name in TORCH_LIBRARIES), "-Wl,--as-needed"]
    cuda = [f"-L{toolkit.library_folder()}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    tidy = ["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-s"]
    whole = folder / library.name
    log = _run(["g++", "-shared", *objects, *torch, *cuda, *tidy, "-o", whole])
    library.parent.mkdir(parents=True, exist_ok=True)
    # Beside the old one first: a process that has that loaded keeps it.
    beside = library.with_name(f".{library.name}.{os.getpid()}")
    shutil.copyfile(whole, beside)
    os.replace(beside, library)
    return log


def build(library: Path = TARGET, arches: tuple[str, ...] = ARCHES, headers: Path | None = None) -> Result:
    """Compiles and links; raises :class:`BuildError` with the compiler's words."""
    started = time.perf_counter()
    toolkit = find_toolkit()
    include = headers or torch_headers()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        jobs = [pool.submit(_compile, toolkit, unit, arches, folder) for unit in UNITS]
        jobs.append(pool.submit(_bind, toolkit, arches, include, folder))
        log = "".join(job.result() for job in jobs) + _link(toolkit, folder, library)
    return Result(library, time.perf_counter() - started, log, toolkit, arches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=TARGET, help="the library to write")
    parser.add_argument("--arch", action="append", choices=ARCHES, help="only for this chip; may be repeated")
    parser.add_argument("--headers", type=Path, help="torch's include folder, if torch is not installed")
    parser.add_argument("-v", "--verbose", action="store_true", help="print registers and shared memory of all kernels")
    options = parser.parse_args()
    try:
        result = build(options.out.resolve(), tuple(options.arch or ARCHES), options.headers)
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    if options.verbose:
        print(result.log)
    size = result.library.stat().st_size / 1e6
    chips = ", ".join(f"sm_{arch}" for arch in result.arches)
    print(f"{result.library} ({size:.1f} MB; {chips}; CUDA {result.toolkit.version}) in {result.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
