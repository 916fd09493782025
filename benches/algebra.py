"""CPU time, wall time and private memory of resizing and merging whole FLUX.1 files, beside torch's SVD and PEFT.

Usage: python benches/algebra.py [--rounds 3] [--folder /dev/shm] [--peers] [-o results.json]
Needs the release binary (`cargo build --release -p lorafmt`); peers need torch and peft. See benches/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench import BINARY, Row, private_peak, run, seconds

#: Layers of FLUX.1 under diffusers' names, by shape: outputs, inputs, how many (38 each, attention seven times).
SHAPES = [
    (3072, 3072, 266),
    (12288, 3072, 76),
    (3072, 12288, 38),
    (3072, 15360, 38),
    (9216, 3072, 38),
    (18432, 3072, 38),
]

#: Shapes that are timed; the cost of the others follows from m n min(m, n).
TIMED = [(3072, 3072), (9216, 3072)]

#: What sd-scripts' `resize_lora.py` and PEFT's `svd` do for a module: the product, and all of its singular values.
TORCH_SVD = """
import sys, time, torch
m, n, rank = map(int, sys.argv[1:4])
torch.manual_seed(0)
up, down = torch.randn(m, rank), torch.randn(rank, n)
started = time.process_time()
u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
print(time.process_time() - started)
"""

#: Two adapters of rank 16 on one layer of the given shape, merged by PEFT's `add_weighted_adapter`.
PEFT_SVD = """
import sys, time, torch
from peft import LoraConfig, get_peft_model
m, n, rank = map(int, sys.argv[1:4])
model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(model, config, adapter_name="a")
model.add_adapter("b", config)
started = time.process_time()
model.add_weighted_adapter(["a", "b"], [0.8, 0.6], "c", combination_type="svd", svd_rank=rank, svd_full_matrices=False)
print(time.process_time() - started)
"""


def cpu_seconds(command: list[object]) -> float:
    """User and system time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*command)()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sample(folder: Path, rank: int, seed: int = 0) -> Path:
    path = folder / f"r{rank}-{seed}.safetensors"
    if not path.exists():
        options = ["--family", "flux1", "--dialect", "kohya", "--rank", rank, "--seed", seed, "-o", path]
        run(BINARY, "sample", *options)()
    return path


def measure(name: str, command: list[object], out: Path, rounds: int) -> Row:
    wall, floor, cpu = [], [], []
    copy = out.with_suffix(".copy")
    for _ in range(rounds + 1):
        out.unlink(missing_ok=True)
        cpu.append(cpu_seconds(command))
        out.unlink(missing_ok=True)
        wall.append(seconds(run(*command)))
        copy.unlink(missing_ok=True)
        floor.append(seconds(run("cp", "--reflink=never", out, copy)))
    out.unlink()
    memory = private_peak(command)
    ratio = statistics.median(w / f for w, f in zip(wall[1:], floor[1:], strict=True))
    row: Row = {
        "what": name,
        "cpu_seconds": round(min(cpu[1:]), 3),
        "seconds": round(min(wall[1:]), 3),
        "ratio_to_cp": round(ratio, 2),
        "private_mib": round(memory, 1),
        "output_mib": round(out.stat().st_size / 2**20, 1),
    }
    print(
        f"{name:44} {row['cpu_seconds']:>7} CPU s {row['seconds']:>7} s  {ratio:6.1f} x cp  {memory:6.0f} MiB",
        flush=True,
    )
    return row


def extrapolated(name: str, program: str, rank: int) -> Row:
    """CPU seconds of a peer for all layers, from the shapes that are timed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def timed(m: int, n: int) -> float:
        command = [sys.executable, "-c", program, str(m), str(n), str(rank)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    costs = {shape: timed(*shape) for shape in TIMED}
    each = statistics.mean(cost / (m * n * min(m, n)) for (m, n), cost in costs.items())
    total = sum(count * costs.get((m, n), each * m * n * min(m, n)) for m, n, count in SHAPES)
    timings = {f"{m}x{n}": round(cost, 2) for (m, n), cost in costs.items()}
    print(f"{name:44} {total:>7.0f} CPU s, extrapolated from {timings}", flush=True)
    return {"what": name, "cpu_seconds_extrapolated": round(total), "timed": timings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("-o", "--output")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        out = folder / "out.safetensors"

        def add(what: str, *command: Any) -> None:
            rows.append(measure(what, [BINARY, *command, "--force", "-o", out], out, options.rounds))

        r16 = [sample(folder, 16, seed) for seed in (0, 1)]
        add("resize r64 -> r16", "resize", sample(folder, 64), "--rank", 16)
        add("resize r128 -> r32", "resize", sample(folder, 128), "--rank", 32)
        add("resize r64, bytes of r16", "resize", sample(folder, 64), "--bytes", "153MB")
        add("resize r16 -> r32 (pad)", "resize", r16[0], "--rank", 32, "--method", "pad")
        pair = [f"{r16[0]}:0.8", f"{r16[1]}:0.6"]
        add("compose 2 x r16, svd to 16", "compose", *pair, "--method", "svd", "--rank", 16)
        add("compose 2 x r16, ties in core space", "compose", *pair, "--method", "ties", "--density", 0.5)
        if options.peers:
            rows.append(extrapolated("torch SVD of every delta, r64", TORCH_SVD, 64))
            rows.append(extrapolated("PEFT svd merge, 2 x r16", PEFT_SVD, 16))
    if options.output:
        system = {"platform": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()}
        Path(options.output).write_text(json.dumps({"system": system, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
