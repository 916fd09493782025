"""Times `lorafmt batch` and `inspect` over many files, against `cp`, Nunchaku's loop and safetensors' own reader.

Usage: python benches/batch.py [--folder /dev/shm] [--rounds 3] [--only TEXT] [-o results.json]
Needs the release binary. `LORAFMT_BENCH_NUNCHAKU` names a checkout of Nunchaku. See benches/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import BINARY, NUNCHAKU, NUNCHAKU_BASE, ROOT, private_peak, run, seconds

#: One process of Nunchaku for all files, as a script over a folder does it: imports count once.
NUNCHAKU_LOOP = f"""{NUNCHAKU}
from pathlib import Path
from nunchaku.lora.flux.diffusers_converter import to_diffusers
from safetensors.torch import save_file
for path in sorted(Path(sys.argv[2]).glob("*.safetensors")):
    save_file({{k: v.clone() for k, v in to_diffusers(str(path)).items()}}, f"{{sys.argv[3]}}/{{path.name}}")
"""

NUNCHAKU_NATIVE_LOOP = f"""{NUNCHAKU_BASE}
from pathlib import Path
for path in sorted(Path(sys.argv[3]).glob("*.safetensors")):
    to_nunchaku(str(path), base, output_path=f"{{sys.argv[4]}}/{{path.name}}")
"""

#: What reading headers costs at least in Python.
SAFE_OPEN_LOOP = """
import sys
from pathlib import Path
from safetensors import safe_open
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "np") as file:
        keys, metadata = list(file.keys()), file.metadata()
"""


def sample(path: Path, rank: int, seed: int) -> None:
    run(BINARY, "sample", "--family", "flux1", "--dialect", "kohya", "--rank", rank, "--seed", seed, "-o", path)()


def big(folder: Path, count: int) -> Path:
    """Full files of rank 16: four are made, the others are copies with another last number."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:03}.safetensors"
        if number < 4:
            sample(path, 16, number)
        else:
            shutil.copy(folder / f"{number % 4:03}.safetensors", path)
            with open(path, "r+b") as file:
                # A file of another content: the last factor's last number.
                file.seek(-2, os.SEEK_END)
                file.write(number.to_bytes(2, "little"))
    return folder


def small(folder: Path, count: int) -> Path:
    """Files of rank 4 with the first modules only, 1.5 MB, that differ everywhere."""
    import numpy
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    sample(folder / "whole.safetensors", 4, 0)
    file = folder / "whole.safetensors"
    run(BINARY, "convert", file, "--to", "kohya", "--dtype", "fp16", "-o", folder / "half.safetensors")()
    tensors = load_file(folder / "half.safetensors")
    for path in folder.iterdir():
        path.unlink()
    keys = [key for key in sorted(tensors) if "single_blocks_0_" in key or "double_blocks_0_" in key]
    part = {key: tensors[key].copy() for key in keys}
    for number in range(count):
        turned = {key: numpy.roll(value.reshape(-1), number).reshape(value.shape) for key, value in part.items()}
        save_file(turned, folder / f"{number:05}.safetensors")
    return folder


def batch(source: Path, out: Path, to: str = "diffusers", *more: object) -> list[object]:
    return [BINARY, "batch", source, "--to", to, "--out-dir", out, "-q", *more]


def copies(source: Path, processes: int) -> Callable[[], None]:
    """`cp` of all files by several processes side by side, each over its own last copy: so many do not fit twice."""
    files = sorted(str(path) for path in source.rglob("*.safetensors"))
    script = 'for file; do cp --reflink=never "$file" "$0" || exit 1; done'

    def work() -> None:
        targets = [f"{source}.copy{n}" for n in range(processes)]
        shares = [files[n::processes] for n in range(processes)]
        running = [subprocess.Popen(["sh", "-c", script, *each]) for each in map(lambda t, s: [t, *s], targets, shares)]
        assert all(process.wait() == 0 for process in running)
        for target in targets:
            os.unlink(target)

    return work


class Rows:
    def __init__(self, only: str, rounds: int) -> None:
        self.only, self.rounds, self.rows = only, rounds, []

    def wants(self, what: str) -> bool:
        return self.only in what

    def timed(self, work: Callable[[], object], out: Path) -> float:
        """The median of rounds that each begin with an empty folder; emptying it is part of no time."""
        taken = []
        for _ in range(self.rounds):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            taken.append(seconds(work))
        return statistics.median(taken)

    def add(self, what: str, **values: object) -> None:
        self.rows.append({"what": what, **values})
        print(f"{what:56} " + "   ".join(f"{key} {value}" for key, value in values.items()), flush=True)


def large(rows: Rows, folder: Path, nunchaku: str | None, python: str) -> None:
    what = "50 files of rank 16, kohya -> diffusers"
    if not rows.wants(what):
        return
    source, out = big(folder / "big", 50), folder / "out"
    command = batch(source, out)
    mine = rows.timed(run(*command), out)
    # What was made last is what is copied.
    floor = statistics.median(seconds(copies(out, 2)) for _ in range(rows.rounds))
    hashed = rows.timed(run(*batch(source, out, "diffusers", "--hash")), out)
    shutil.rmtree(out)
    values = {"seconds": round(mine, 2), "two cp": round(floor, 2), "ratio": round(mine / floor, 2)}
    rows.add(what, **values, with_hashes=round(hashed / floor, 2))
    out.mkdir()
    rows.add("private memory, 50 files of rank 16", MiB=round(private_peak(command), 1))
    if nunchaku:
        shutil.rmtree(out)
        out.mkdir()
        theirs = seconds(run(python, "-c", NUNCHAKU_LOOP, nunchaku, source, out))
        rows.add("Nunchaku, 50 files, one process", seconds=round(theirs, 1), times=round(theirs / mine, 1))
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(source)


def native(rows: Rows, folder: Path, nunchaku: str | None, python: str) -> None:
    what = "20 files of rank 16, kohya -> nunchaku, one base"
    if not rows.wants(what):
        return
    sys.path.insert(0, str(ROOT / "tests/python"))
    from bases import BaseSpec, make_base

    base = make_base(folder / "base.safetensors", BaseSpec(19, 38, rank=32, layout="v1"))
    source, out = big(folder / "big", 20), folder / "out"
    mine = rows.timed(run(*batch(source, out, "nunchaku", "--base", base)), out)
    floor = statistics.median(seconds(copies(out, 2)) for _ in range(rows.rounds))
    values = {"seconds": round(mine, 2), "two cp": round(floor, 2), "ratio": round(mine / floor, 2)}
    rows.add(what, **values)
    if nunchaku:
        shutil.rmtree(out)
        out.mkdir()
        theirs = seconds(run(python, "-c", NUNCHAKU_NATIVE_LOOP, nunchaku, base, source, out))
        rows.add("Nunchaku, 20 files to native", seconds=round(theirs, 1), times=round(theirs / mine, 1))
    for path in (out, source):
        shutil.rmtree(path)
    base.unlink()


def many(rows: Rows, folder: Path) -> None:
    for count in (50, 200, 1000, 2000):
        what = f"{count} small files, kohya -> diffusers"
        if not rows.wants(what):
            continue
        source, out = small(folder / "small", count), folder / "out"
        mine = rows.timed(run(*batch(source, out)), out)
        floor = statistics.median(seconds(copies(out, 2)) for _ in range(rows.rounds))
        shutil.rmtree(out)
        out.mkdir()
        peak = private_peak(batch(source, out))
        again = seconds(run(*batch(source, out)))
        rate, resumed = round(count / mine), round(count / again)
        values = {"seconds": round(mine, 3), "two cp": round(floor, 3), "files_per_s": rate, "unchanged_per_s": resumed}
        rows.add(what, **values, MiB=round(peak, 1))
        for path in (out, source):
            shutil.rmtree(path)


def scan(rows: Rows, folder: Path, python: str) -> None:
    what = "inspect --json, 10,000 headers"
    if not rows.wants(what):
        return
    source = small(folder / "small", 10_000)
    command = [BINARY, "inspect", "-r", source, "--json"]
    mine = statistics.median(seconds(run(*command)) for _ in range(rows.rounds))
    theirs = statistics.median(seconds(run(python, "-c", SAFE_OPEN_LOOP, source)) for _ in range(rows.rounds))
    peak = private_peak(command)
    values = {"seconds": round(mine, 2), "files_per_s": round(10_000 / mine), "MiB": round(peak, 1)}
    rows.add(what, **values, safe_open_files_per_s=round(10_000 / theirs))
    shutil.rmtree(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    nunchaku = os.environ.get("LORAFMT_BENCH_NUNCHAKU")
    rows = Rows(args.only, args.rounds)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        many(rows, folder)
        scan(rows, folder, sys.executable)
        native(rows, folder, nunchaku, sys.executable)
        large(rows, folder, nunchaku, sys.executable)
    if args.output:
        about = {"platform": platform.platform(), "cpus": os.cpu_count(), "rounds": args.rounds}
        args.output.write_text(json.dumps({**about, "rows": rows.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
