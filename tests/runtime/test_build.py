"""The kernels compile as they are meant to, and the library holds only what it may. Needs nvcc 13, but no GPU.

Everything is read off one build for two chips: the oldest and Hopper.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import build
import generate_wgmma

ROOT = Path(__file__).resolve().parents[2]
ARCHES = ("80", "90a")

#: What the library may need of others: torch's stable functions and the system's.
LIBRARIES = re.compile(r"lib(torch_cpu|torch_cuda|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so[.0-9]*|ld-linux-x86-64\.so\.2")
FOREIGN = re.compile(r"^(Py|_Py|cuda|cu[A-Z]|nv|_ZN2at|_ZN3c10|_ZN5torch)")
STABLE = re.compile(r"^(aoti_torch_|torch_)")

#: Chip -> instructions that its kernels must contain.
MACHINE_CODE = {
    "sm_80": {"IMMA.16832.S8.S8", "HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS", "LDSM"},
    "sm_90a": {
        "IGMMA.64x256x32.S8.S8",
        "IGMMA.64x192x32.S8.S8",
        "HGMMA.64x256x16.F32.BF16",
        "HGMMA.64x64x16.F32.BF16",
        "HGMMA.64x192x16.F32 ",
        "UTMALDG.2D",
        "USETMAXREG",
        "UCGABAR_ARV",
    },
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[build.Result]:
    try:
        build.find_toolkit()
    except build.BuildError as error:
        pytest.skip(f"nvcc is not installed (tests/requirements.txt has it for Linux on x86-64): {error}")
    folder = tmp_path_factory.mktemp("cuda")
    yield build.build(folder / "lorafmt_cuda.so", ARCHES)
    shutil.rmtree(folder, ignore_errors=True)


def kernels(log: str) -> list[tuple[str, str, int, str]]:
    """Chip, mangled name, registers and the line on stack and spills of every kernel in ptxas' report."""
    head = r"Compiling entry function '(\S+)' for '(\S+)'\n.*?Function properties for \1\n"
    found = re.findall(head + r"\s*(.*?)\n.*?Used (\d+) registers", log, re.S)
    return [(chip, name, int(count), line) for name, chip, line, count in found]


def test_nothing_spills(built: build.Result) -> None:
    found = kernels(built.log)
    # prologue: 2 types x 5 ranks; gemm: 2 types; on Hopper also 2 x 4 prologues and 2 x 4 products
    counts = {chip: sum(kernel[0] == chip for kernel in found) for chip in ("sm_80", "sm_90a")}
    assert counts == {"sm_80": 12, "sm_90a": 28}
    for chip, name, registers, line in found:
        assert line == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", (chip, name)
        assert registers <= 255, (chip, name)
    assert not re.search(r"C75\d\d", built.log), "warpgroup products are serialized"


def test_registers_leave_room_for_all_threads(built: build.Result) -> None:
    """The bound at entry: 168 for 384 threads, 128 for 512, 112 where two blocks of 288 share a multiprocessor."""
    hopper = {name: registers for chip, name, registers, _ in kernels(built.log) if chip == "sm_90a"}
    for name, registers in hopper.items():
        consumers = re.search(r"5ShapeILi(\d)ELi\d+E", name)
        cluster = re.search(r"prologue_cluster.*Li(\d)ELi\d+E", name)
        if consumers:
            assert registers <= 65536 // (128 * (int(consumers[1]) + 1)) // 8 * 8
        elif cluster:
            assert registers <= (112 if int(cluster[1]) < 3 else 224)


def disassembler() -> str | None:
    """cuobjdump, of the path or of triton, which brings one."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def test_machine_code_has_the_instructions(built: build.Result) -> None:
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: neither on the path nor in triton")
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    for chip, wanted in MACHINE_CODE.items():
        command = [tool, "--dump-sass", "-arch", chip, str(built.library)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        text = re.sub(r"(HG?MMA\.\S*\.F32) R", r"\1  R", text)
        assert {name for name in wanted if name not in text} == set(), chip
        assert not re.search(r"\b(LDL|STL)\b", text), f"{chip}: local memory"


def test_the_library_needs_torch_and_the_system_only(built: build.Result) -> None:
    dynamic = subprocess.run(["readelf", "-d", built.library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert [name for name in needed if not LIBRARIES.fullmatch(name)] == []
    symbols = subprocess.run(["nm", "-D", "-u", built.library], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1].partition("@")[0] for line in symbols.splitlines()]
    assert [name for name in undefined if FOREIGN.match(name)] == []
    assert {"aoti_torch_get_current_cuda_stream", "torch_library_impl"} <= {
        name for name in undefined if STABLE.match(name)
    }
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", built.library], capture_output=True, text=True, check=True
    ).stdout
    assert "lorafmt_cuda_mark" in defined and "lorafmt::" not in defined and "_ZN7lorafmt" not in defined


def test_it_is_small_says_what_it_is_and_loads(built: build.Result) -> None:
    assert built.library.stat().st_size <= 8e6
    code = f"""
import sys
from pathlib import Path
import torch
from lorafmt.runtime import library, ops
built = library.Built.read(Path({str(built.library)!r}))
assert built.abi == library.ABI and built.arches == {ARCHES!r}, built
torch.ops.load_library({str(built.library)!r})
for name in ("quantize_down", "linear_w8a8"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lorafmt::{{name}}", "CUDA"), name
x = torch.ones(2, 16, dtype=torch.bfloat16)
assert ops.quantize_down(x, torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(0))[0].tolist() == [[127] * 16] * 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_generated_wrappers_are_up_to_date() -> None:
    assert (ROOT / "cuda" / "csrc" / "wgmma.cuh").read_text() == generate_wgmma.text()


def test_index_functions_with_a_plain_compiler(tmp_path: Path) -> None:
    """tests/runtime/layout_test.cpp: every index function, exhaustively."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path / "layout_test"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'cuda' / 'csrc'}"]
    subprocess.run(["g++", *flags, ROOT / "tests" / "runtime" / "layout_test.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_sides_name_the_same_kernels_and_signatures() -> None:
    """Numbers of launch.h and binding.cpp against those of the Python side."""
    from lorafmt.runtime import library, ops

    launch = (ROOT / "cuda" / "csrc" / "launch.h").read_text()
    names = re.search(r"enum Kernel \{(.*?)\}", launch)[1].replace(" ", "").split(",")  # type: ignore[index]
    python = {
        "kAuto": ops.AUTO,
        "kMma": ops.MMA,
        "kWgmma128x256": ops.WGMMA_128x256,
        "kWgmma192x192": ops.WGMMA_192x192,
    }
    python |= {"kWgmma128x192": ops.WGMMA_128x192, "kWgmma128x128": ops.WGMMA_128x128}
    assert {name: number for number, name in enumerate(names)} == python
    assert f"lorafmt-cuda abi={library.ABI} " in (ROOT / "cuda" / "csrc" / "binding.cpp").read_text()
