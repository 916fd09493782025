"""Times `lorafmt fuse`, `unfuse` and `extract` against `cp` of the base in the same run, with peak private memory.

Usage: python benches/fuse.py [--gib 2] [--adapters 2] [--rank 16] [--rounds 3] [--folder DIR] [-o results.json]
The base has FLUX.1's shapes: as many of its blocks as fit the size (24 GB is all of them). Needs the release binary
(`cargo build --release -p lorafmt`), or LORAFMT_BENCH_BINARY.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
BINARY = Path(os.environ.get("LORAFMT_BENCH_BINARY", ROOT / "target/release/lorafmt"))

#: Weights of a block in the original names, and the adapters' names of them.
DOUBLE = {
    "img_attn.qkv": (9216, 3072),
    "txt_attn.qkv": (9216, 3072),
    "img_attn.proj": (3072, 3072),
    "txt_attn.proj": (3072, 3072),
    "img_mlp.0": (12288, 3072),
    "img_mlp.2": (3072, 12288),
    "txt_mlp.0": (12288, 3072),
    "txt_mlp.2": (3072, 12288),
    "img_mod.lin": (18432, 3072),
    "txt_mod.lin": (18432, 3072),
}
SINGLE = {"linear1": (21504, 3072), "linear2": (3072, 15360), "modulation.lin": (9216, 3072)}


def modules(size: int) -> dict[str, tuple[int, int]]:
    """Weights in the order of the model, until `size` bytes of bfloat16 are reached."""
    blocks = [(f"double_blocks.{i}", DOUBLE) for i in range(19)] + [(f"single_blocks.{i}", SINGLE) for i in range(38)]
    out: dict[str, tuple[int, int]] = {}
    total = 0
    for block, shapes in blocks:
        for name, shape in shapes.items():
            if total < size:
                out[f"{block}.{name}"] = shape
                total += 2 * shape[0] * shape[1]
    return out


def bf16(rng: np.random.Generator, count: int, size: float) -> bytes:
    bits = (size * rng.standard_normal(count, dtype=np.float32)).view(np.uint32)
    return (bits >> 16).astype("<u2").tobytes()


def write(path: Path, shapes: dict[str, tuple[int, ...]], size: float, seed: int) -> None:
    """Random bfloat16 tensors, one at a time."""
    header, at = {}, 0
    for key, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write(bf16(rng, int(np.prod(shape)), size))


def adapter(path: Path, weights: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, cols) in weights.items():
        key = "lora_unet_" + name.replace(".", "_")
        shapes |= {f"{key}.lora_up.weight": (rows, rank), f"{key}.lora_down.weight": (rank, cols)}
    write(path, shapes, 0.02, seed)


def run(command: list[str | Path]) -> tuple[float, int]:
    """Seconds, and the peak of private (anonymous) memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        except OSError:
            pass
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        weights = modules(int(args.gib * 2**30))
        base, out, undo, back = (folder / f"{n}.safetensors" for n in ("base", "out", "undo", "back"))
        write(base, {f"{name}.weight": shape for name, shape in weights.items()}, 0.02, 0)
        loras = [folder / f"lora{i}.safetensors" for i in range(args.adapters)]
        for i, path in enumerate(loras):
            adapter(path, weights, args.rank, i + 1)
        lorafmt = str(BINARY)
        family = ["--family", "flux1", "--force", "-q"]
        fuse = [lorafmt, "fuse", str(base), *(f"{p}:0.8" for p in loras), *family, "-o", str(out)]
        commands = {
            "cp": ["cp", "--reflink=never", str(base), str(out)],
            "fuse": fuse,
            "fuse --undo": [*fuse, "--undo", str(undo)],
            "unfuse": [lorafmt, "unfuse", str(out), "--undo", str(undo), "-o", str(back), "--force", "-q"],
            "extract": [
                lorafmt,
                "extract",
                out,
                base,
                "--rank",
                str(args.rank),
                *family,
                "-o",
                folder / "x.safetensors",
            ],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peaks = dict.fromkeys(commands, 0)
        for _ in range(args.rounds):
            for name, command in commands.items():
                # Every command writes a new file.
                if name in ("cp", "fuse", "fuse --undo"):
                    out.unlink(missing_ok=True)
                took, peak = run(command)
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
        if back.read_bytes() != base.read_bytes():
            raise SystemExit("the restored base differs")
        floor = statistics.median(seconds["cp"])
        results = {
            name: {
                "seconds": statistics.median(values),
                "ratio_to_cp": statistics.median(values) / floor,
                "private_mib": peaks[name] / 2**20,
            }
            for name, values in seconds.items()
        }
        results["undo"] = {"bytes": undo.stat().st_size, "of": base.stat().st_size}
        print(json.dumps(results, indent=2))
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
