"""Times lorafmt against the floor (`cp` of the bytes it writes) and against its peers, pair by pair in one run.

Usage: python benches/bench.py [--rounds 9] [--folder /dev/shm] [--peers] [-o results.json]
Needs the release binary (`cargo build --release -p lorafmt`) and the installed package. See benches/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BINARY = Path(os.environ.get("LORAFMT_BENCH_BINARY", ROOT / "target/release/lorafmt"))

#: A whole process of diffusers that does what `lorafmt convert` does. The clone un-shares the q/k/v factors, which
#: the safetensors saver refuses otherwise.
DIFFUSERS = """
import sys, torch
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
state = FluxLoraLoaderMixin.lora_state_dict(load_file(sys.argv[1]))
state = state[0] if isinstance(state, tuple) else state
save_file({k: v.clone() for k, v in state.items()}, sys.argv[2])
"""

#: The same with Nunchaku's own converter, from a checkout. Its package would import compiled kernels first; an empty
#: stand-in for the package spares it that time.
NUNCHAKU = """
import sys, types
package = sys.modules["nunchaku"] = types.ModuleType("nunchaku")
package.__path__ = [sys.argv[3] + "/nunchaku"]
from nunchaku.lora.flux.diffusers_converter import to_diffusers
from safetensors.torch import save_file
save_file({k: v.clone() for k, v in to_diffusers(sys.argv[1]).items()}, sys.argv[2])
"""

Row = dict[str, object]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(*command: object) -> Callable[[], object]:
    return lambda: subprocess.run(
        [str(c) for c in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def against_cp(name: str, work: Callable[[], object], output: Path, rounds: int) -> Row:
    """Runs the operation and a `cp` of its output in turn; the ratio is the median of the pairwise ratios."""
    copy = output.with_suffix(".copy")
    mine, floor = [], []
    for _ in range(rounds + 1):  # the first round warms the page cache and does not count
        output.unlink(missing_ok=True)
        mine.append(seconds(work))
        copy.unlink(missing_ok=True)
        floor.append(seconds(run("cp", "--reflink=never", output, copy)))
    copy.unlink()
    ratios = [a / b for a, b in zip(mine[1:], floor[1:], strict=True)]
    row: Row = {
        "what": name,
        "seconds": round(statistics.median(mine[1:]), 4),
        "cp": round(statistics.median(floor[1:]), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "bytes": output.stat().st_size,
    }
    print(f"{name:52} {row['seconds']:8.4f} s   cp {row['cp']:8.4f} s   ratio {row['ratio']:.2f}", flush=True)
    return row


def private_peak(command: list[object]) -> float:
    """Peak anonymous memory of a process in MiB: what it allocates, without the mapped input."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon"):
                        peak = max(peak, int(line.split()[1]))
            except OSError:
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    watcher.join()
    return peak / 1024


def median_of(name: str, work: Callable[[], object], rounds: int) -> Row:
    work()
    value = statistics.median(seconds(work) for _ in range(rounds))
    print(f"{name:52} {value * 1000:8.1f} ms", flush=True)
    return {"what": name, "seconds": round(value, 5)}


def peers(source: Path, output: Path, rounds: int) -> list[Row]:
    """Whole processes of the peers that can be had, each paired with one of lorafmt."""
    rows: list[Row] = []
    found = {"diffusers": [sys.executable, "-c", DIFFUSERS, source, output]}
    if path := os.environ.get("LORAFMT_BENCH_NUNCHAKU"):
        found["nunchaku"] = [sys.executable, "-c", NUNCHAKU, source, output, path]
    if path := os.environ.get("LORAFMT_BENCH_SD_SCRIPTS"):
        script = Path(path) / "networks/convert_flux_lora.py"
        dialects = ["--src", "sd-scripts", "--dst", "ai-toolkit"]
        files = ["--src_path", source, "--dst_path", output]
        found["sd-scripts"] = ["env", f"PYTHONPATH={path}", sys.executable, script, *dialects, *files]
    mine = run(BINARY, "convert", source, "--to", "diffusers", "-o", output, "--force", "-q")
    for name, command in found.items():
        ratios, times = [], []
        for _ in range(rounds + 1):
            output.unlink(missing_ok=True)
            theirs = seconds(run(*command))
            output.unlink(missing_ok=True)
            ratios.append(theirs / seconds(mine))
            times.append(theirs)
        row: Row = {
            "what": f"{name}, whole process, r16",
            "seconds": round(statistics.median(times[1:]), 3),
            "times_slower": round(statistics.median(ratios[1:]), 1),
        }
        print(f"{row['what']:52} {row['seconds']:8.3f} s   {row['times_slower']} times lorafmt's", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    import lorafmt

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        out = folder / "out.safetensors"
        files = {}
        for rank, alpha, dialect in [
            (16, 16, "kohya"),
            (16, 4, "kohya"),
            (128, 128, "kohya"),
            (16, None, "diffusers"),
        ]:
            path = folder / f"{dialect}-r{rank}-a{alpha}.safetensors"
            extra = [] if alpha is None else ["--alpha", alpha]
            run(
                BINARY,
                "sample",
                "--family",
                "flux1",
                "--dialect",
                dialect,
                "--rank",
                rank,
                "-o",
                path,
                *extra,
            )()
            files[dialect, rank, alpha] = path
        plans = [
            ("kohya -> diffusers r16, exact", files["kohya", 16, 16], "diffusers"),
            ("kohya -> diffusers r16, alpha folded", files["kohya", 16, 4], "diffusers"),
            ("kohya -> comfyui r16", files["kohya", 16, 16], "comfyui"),
            ("diffusers -> kohya r16", files["diffusers", 16, None], "kohya"),
            ("kohya -> diffusers r128, exact", files["kohya", 128, 128], "diffusers"),
        ]
        for title, source, to in plans:
            rounds = arguments.rounds if "r16" in title else min(arguments.rounds, 5)
            work = lambda source=source, to=to: lorafmt.convert(source, out, to=to, overwrite=True)  # noqa: E731
            rows.append(against_cp(f"in process: {title}", work, out, rounds))
            command = (BINARY, "convert", source, "--to", to, "-o", out, "--force", "-q")
            rows.append(against_cp(f"whole process: {title}", run(*command), out, rounds))
        for rank in (16, 128):
            command = [
                BINARY,
                "convert",
                files["kohya", rank, rank],
                "--to",
                "diffusers",
                "-o",
                out,
                "--force",
                "-q",
            ]
            peak = max(private_peak(command) for _ in range(3))
            rows.append({"what": f"private memory, r{rank}", "MiB": round(peak, 1)})
            print(f"private memory, r{rank:<34} {peak:8.1f} MiB", flush=True)
        big = files["kohya", 128, 128]
        rows.append(median_of("lorafmt --version", run(BINARY, "--version"), 15))
        rows.append(median_of("lorafmt inspect, 1.2 GB", run(BINARY, "inspect", big), 15))
        rows.append(median_of("python -c pass", run(sys.executable, "-c", "pass"), 15))
        rows.append(median_of("python -c 'import lorafmt'", run(sys.executable, "-c", "import lorafmt"), 15))
        if arguments.peers:
            rows.extend(peers(files["kohya", 16, 16], out, 3))
    document = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "version": lorafmt.__version__,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
