"""One command for a machine with a GPU: is it right, is it the same twice, how fast is it against what.

    python cuda/bench/gpu_check.py --out results

Builds the kernels if they are not there, ends inside ten minutes, prints a short table last and writes everything to
``OUT/gpu_check.json``. Exit status 1: something is wrong (not: slow).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "python")]

import build  # noqa: E402


def ensure_library() -> None:
    """Builds beside the module if there is no library yet; it is looked for when the operators are imported."""
    if not os.environ.get("LORAFMT_CUDA_LIBRARY") and not build.TARGET.exists():
        print(f"built in {build.build().seconds:.0f} s", flush=True)


import torch  # noqa: E402

if not torch.cuda.is_available():
    sys.exit("gpu_check: torch sees no CUDA device; tests/runtime is what runs without one")
ensure_library()

import baselines  # noqa: E402
from correctness import KERNELS, check_all  # noqa: E402
from lorafmt import runtime  # noqa: E402
from lorafmt.runtime import library  # noqa: E402
from timing import Replay, copy_rate, in_turn, product_rate  # noqa: E402

#: (K, N) of the linears of a FLUX.1 transformer.
SHAPES = ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072))
ROWS = 4608
SMALL_ROWS = (1, 16, 256)
RANK = 64


def environment() -> dict[str, object]:
    """Hardware and versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver, power limit, largest clock": smi,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "library": dataclasses.asdict(library.Built.read(library.library())) if library.load() else runtime.status(),
    }


def ceilings() -> dict[str, float]:
    """What the machine does at best, as torch reaches it."""
    return {"copy TB/s": copy_rate(), "bf16 product TFLOP/s": product_rate()}


def kernels() -> dict[str, int]:
    """The kernels that this chip has."""
    hopper = torch.cuda.get_device_capability(0) == (9, 0)
    return {name: kernel for name, kernel in KERNELS.items() if hopper or name == "mma"}


def time_shape(m: int, k: int, n: int, r: int, compiled: bool, variants: bool) -> dict[str, float]:
    """Microseconds of everything at one shape. Inputs rotate over more bytes than the cache holds."""
    torch._dynamo.config.recompile_limit = 64  # one program for each shape
    sets = min(6, max(2, math.ceil(150e6 / (m * k * 2 + n * k * 2 + m * n * 2))))
    cases = [baselines.Case.random(m, k, n, r, seed) for seed in range(sets)]
    replays = {}
    for name, make in rivals(m, compiled, variants).items():
        try:
            replays[name] = Replay([make(case) for case in cases])
        except Exception as error:
            print(f"{name} at {(m, k, n, r)}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return in_turn(replays)


def rivals(m: int, compiled: bool, variants: bool) -> dict[str, Callable[[baselines.Case], baselines.Call]]:
    """Name -> what makes a call out of a case."""
    found = {
        "B0 merged": baselines.merged,
        "B1 separate, eager": baselines.separate_eager,
        "fused": baselines.fused,
        "P": baselines.prologue_only,
        "G": baselines.product_only,
    }
    if compiled:
        found["B1 separate, compiled"] = baselines.separate_compiled
        found["B2 fp8"] = baselines.fp8_separate
        found["scaled_mm alone"] = baselines.scaled_mm_only
        if m > 16:
            import triton_fused

            found["B3 int8"] = baselines.int8_separate
            found["B4 triton"] = triton_fused.fused
    if variants:
        for name, kernel in kernels().items():
            found[f"G {name}"] = functools.partial(baselines.product_only, kernel=kernel)
    return found


def ratios(times: dict[str, float]) -> dict[str, float]:
    """How many times faster than each baseline; B1 is the faster of its two."""
    fused = times["fused"]
    best = {name: times[name] for name in times if name.startswith(("B0", "B2", "B3", "B4"))}
    best["B1 separate"] = min(time for name, time in times.items() if name.startswith("B1"))
    found = {name: time / fused for name, time in sorted(best.items())}
    if "scaled_mm alone" in times:
        found["G / scaled_mm"] = times["scaled_mm alone"] / times["G"]
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [" " * 22 + "".join(f"{name[:15]:>16}" for name in columns)]
    for name, row in rows.items():
        lines.append(f"{name:<22}" + "".join(f"{row[c]:16.2f}" if c in row else " " * 16 for c in columns))
    return "\n".join(lines)


def mean_row(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Geometric means over shapes."""
    columns = set.intersection(*(set(row) for row in rows.values()))
    order = [name for name in next(iter(rows.values())) if name in columns]
    return {c: math.exp(sum(math.log(row[c]) for row in rows.values()) / len(rows)) for c in order}


def sanitizer(seconds: int) -> dict[str, str]:
    """compute-sanitizer over one small case, where it works; it does not on every virtual machine."""
    found = {}
    small = (
        "import sys; sys.path[:0] = [{!r}, {!r}]; import torch, correctness as c; "
        "print(c.check_case(77, 208, 264, 40, torch.bfloat16, 7, {!r}))"
    ).format(str(HERE), str(HERE.parents[1] / "python"), kernels())
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, sys.executable, "-c", small]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line or line.startswith("[")]
            found[tool] = " ".join(lines)[-200:] or (done.stdout + done.stderr)[-200:]
            if " 0 errors" not in found[tool] and "(0 errors" not in found[tool]:
                print(done.stdout[-4000:], flush=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            found[tool] = f"not run: {type(error).__name__}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of gpu_check.json")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random inputs; fresh unless given")
    parser.add_argument(
        "--skip", action="append", default=[], choices=("correctness", "sanitizer", "compiled", "small")
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    report: dict[str, object] = {"seed": options.seed, "environment": environment()}
    print(json.dumps(report["environment"], indent=1), flush=True)

    def note(name: str, value: object) -> None:
        report[name] = value
        report["seconds"] = time.perf_counter() - started
        (options.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
        print(f"[{report['seconds']:.0f} s] {name}", flush=True)

    note("ceilings", ceilings())
    wrong = 0
    if "correctness" not in options.skip:
        checked = check_all(kernels(), options.seed)
        wrong = len(checked["failures"])  # type: ignore[arg-type]
        note("correctness", checked)
        print(f"{checked['cases']} shapes, {wrong} failures", *checked["failures"][:12], sep="\n  ")  # type: ignore[index]
    if "sanitizer" not in options.skip:
        note("sanitizer", sanitizer(60))
        print(report["sanitizer"])

    compiled = "compiled" not in options.skip
    times = {f"{k} -> {n}": time_shape(ROWS, k, n, RANK, compiled, True) for k, n in SHAPES}
    note(f"microseconds, M {ROWS}, R {RANK}", times)
    speed = {name: ratios(row) for name, row in times.items()}
    speed["geometric mean"] = mean_row(speed)
    note("times faster than", speed)
    ranks = {}
    for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)):
        row = {f"R {r}": time_shape(ROWS, k, n, r, False, False) for r in (0, 64, 160)}
        ranks[f"{k} -> {n}"] = {name: value["fused"] / row["R 0"]["fused"] - 1 for name, value in row.items()}
    note("cost of the ranks", ranks)
    if "small" not in options.skip:
        small = {
            f"M {m}, {k} -> {n}": time_shape(m, k, n, RANK, compiled, False)
            for m in SMALL_ROWS
            for k, n in SHAPES[:4:2]
        }
        note("microseconds, few rows", small)
        print(table(small))
    print(json.dumps(report["ceilings"]), table(times), table(speed), table(ranks), sep="\n")
    print(f"{report['seconds']:.0f} s, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
