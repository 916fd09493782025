"""Times lorafmt against the floor (`cp` of the bytes it writes) and against its peers, pair by pair in one run.

Usage: python benches/bench.py [--rounds 9] [--folder /dev/shm] [--only TEXT] [--quick] [--peers] [-o results.json]
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
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

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

#: Nunchaku's own tools, from a checkout. Its package would import compiled kernels first; an empty stand-in for the
#: package spares it that time.
NUNCHAKU = """
import sys, types
package = sys.modules["nunchaku"] = types.ModuleType("nunchaku")
package.__path__ = [sys.argv[1] + "/nunchaku"]
"""

NUNCHAKU_CONVERT = f"""{NUNCHAKU}
from nunchaku.lora.flux.diffusers_converter import to_diffusers
from safetensors.torch import save_file
save_file({{k: v.clone() for k, v in to_diffusers(sys.argv[2]).items()}}, sys.argv[3])
"""

NUNCHAKU_COMPOSE = f"""{NUNCHAKU}
from nunchaku.lora.flux.compose import compose_lora
loras = [(path, float(strength)) for path, strength in zip(sys.argv[3::2], sys.argv[4::2])]
compose_lora(loras, sys.argv[2])
"""

#: Of the base only what the converter looks at is read, as its runtime keeps it; its own command reads all of the file.
NUNCHAKU_BASE = f"""{NUNCHAKU}
import torch
from safetensors import safe_open
from nunchaku.lora.flux.nunchaku_converter import to_nunchaku
base = {{}}
with safe_open(sys.argv[2], "pt") as file:
    for name in file.keys():
        shape = file.get_slice(name).get_shape()
        if name.endswith(".qweight"):
            base[name] = torch.empty(shape, dtype=torch.int8, device="meta")
        elif "lora" in name or len(shape) == 1:
            base[name] = file.get_tensor(name)
"""

NUNCHAKU_NATIVE = f"""{NUNCHAKU_BASE}
from nunchaku.lora.flux.compose import compose_lora
loras = [(path, float(strength)) for path, strength in zip(sys.argv[4::2], sys.argv[5::2])]
to_nunchaku(compose_lora(loras) if len(loras) > 1 else loras[0][0], base, output_path=sys.argv[3])
"""

#: What an adapter behind an open base takes beside the tensors that it becomes, in MiB.
WARM_MEMORY = """
import sys, threading, time
import lorafmt, torch

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

base = lorafmt.Base.open(sys.argv[1])
before = peak = private()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, private())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
tensors = base.to_torch(sys.argv[2])
done.set()
watcher.join()
print((max(peak, private()) - before) / 1024 - sum(t.nbytes for t in tensors.values()) / 2**20)
"""

Row = dict[str, object]
Work = Callable[[], object]


def seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(*command: object) -> Work:
    return lambda: subprocess.run(
        [str(c) for c in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


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
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}")
    return peak / 1024


@dataclass
class Bench:
    """The inputs, which are made when they are needed, and the rows so far."""

    folder: Path
    rounds: int
    only: str
    rows: list[Row] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out.safetensors"

    def sample(self, dialect: str, rank: int, alpha: int | None = None, seed: int = 0, family: str = "flux1") -> Path:
        path = self.folder / f"{family}-{dialect}-r{rank}-a{alpha}-{seed}.safetensors"
        if not path.exists():
            extra = [] if alpha is None else ["--alpha", alpha]
            options = ["--family", family, "--dialect", dialect, "--rank", rank, "--seed", seed, "-o", path]
            run(BINARY, "sample", *options, *extra)()
        return path

    def loras(self, count: int) -> list[tuple[Path, float]]:
        """So many files of rank 16 with different contents, at strengths that no binary fraction is."""
        return [(self.sample("kohya", 16, 16, seed), 0.9 - seed / 10) for seed in range(count)]

    @cached_property
    def base(self) -> Path:
        """A quantized FLUX.1 of full size. Its 4-bit weights, which nothing here reads, are holes in the file."""
        sys.path.insert(0, str(ROOT / "tests/python"))
        from bases import BaseSpec, make_base

        return make_base(self.folder / "base.safetensors", BaseSpec(19, 38, rank=32, layout="v1"))

    def wants(self, *names: str) -> bool:
        return any(self.only in name for name in names)

    def add(self, row: Row, text: str) -> None:
        self.rows.append(row)
        print(f"{row['what']:56} {text}", flush=True)

    def against_cp(self, name: str, work: Work, output: Path | None = None, rounds: int | None = None) -> None:
        """Runs the operation and a `cp` of its output in turn; the ratio is the median of the pairwise ratios.

        An operation that writes no file is compared with a `cp` of `output`, which holds the same bytes.
        """
        if not self.wants(name):
            return
        made = output or self.out
        copy = made.with_suffix(".copy")
        mine, floor = [], []
        for _ in range((rounds or self.rounds) + 1):  # the first round warms the page cache and does not count
            if output is None:
                made.unlink(missing_ok=True)
            mine.append(seconds(work))
            copy.unlink(missing_ok=True)
            floor.append(seconds(run("cp", "--reflink=never", made, copy)))
        copy.unlink()
        ratios = [a / b for a, b in zip(mine[1:], floor[1:], strict=True)]
        row: Row = {
            "what": name,
            "seconds": round(statistics.median(mine[1:]), 4),
            "cp": round(statistics.median(floor[1:]), 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "bytes": made.stat().st_size,
        }
        self.add(row, f"{row['seconds']:8.4f} s   cp {row['cp']:8.4f} s   ratio {row['ratio']:.2f}")

    def both(self, title: str, work: Work, command: list[object], rounds: int | None = None) -> None:
        """The same in a running interpreter, and as a whole process."""
        for name, each in zip(both(title), (work, run(*command)), strict=True):
            self.against_cp(name, each, rounds=rounds)

    def memory(self, name: str, measure: Callable[[], float]) -> None:
        if self.wants(name):
            peak = max(measure() for _ in range(min(3, self.rounds)))
            self.add({"what": name, "MiB": round(peak, 1)}, f"{peak:8.1f} MiB")

    def median_of(self, name: str, work: Work) -> None:
        if self.wants(name):
            work()
            value = statistics.median(seconds(work) for _ in range(15))
            self.add({"what": name, "seconds": round(value, 5)}, f"{value * 1000:8.1f} ms")

    def against_peer(self, name: str, theirs: list[object], mine: list[object]) -> None:
        """Whole processes of a peer, each paired with one of lorafmt."""
        if not self.wants(name):
            return
        ratios, times = [], []
        for _ in range(min(3, self.rounds) + 1):
            self.out.unlink(missing_ok=True)
            times.append(seconds(run(*theirs)))
            self.out.unlink(missing_ok=True)
            ratios.append(times[-1] / seconds(run(*mine)))
        row: Row = {
            "what": name,
            "seconds": round(statistics.median(times[1:]), 3),
            "times_slower": round(statistics.median(ratios[1:]), 1),
        }
        self.add(row, f"{row['seconds']:8.3f} s   {row['times_slower']} times lorafmt's")


def convert_command(source: Path, to: str, out: Path, *options: object) -> list[object]:
    return [BINARY, "convert", source, "--to", to, "-o", out, "--force", "-q", *options]


def compose_command(loras: list[tuple[Path, float]], to: str, out: Path, *options: object) -> list[object]:
    sources = [f"{path}:{strength:g}" for path, strength in loras]
    return [BINARY, "compose", *sources, "--to", to, "-o", out, "--force", "-q", *options]


def both(title: str) -> tuple[str, str]:
    return f"in process: {title}", f"whole process: {title}"


def conversions(bench: Bench, big: bool) -> None:
    import lorafmt

    plans: list[tuple[str, Callable[[], Path], str]] = [
        ("kohya -> diffusers r16, exact", partial(bench.sample, "kohya", 16, 16), "diffusers"),
        ("kohya -> diffusers r16, alpha folded", partial(bench.sample, "kohya", 16, 4), "diffusers"),
        ("kohya -> comfyui r16", partial(bench.sample, "kohya", 16, 16), "comfyui"),
        ("diffusers -> kohya r16", partial(bench.sample, "diffusers", 16), "kohya"),
        ("kohya -> diffusers r128, exact", partial(bench.sample, "kohya", 128, 128), "diffusers"),
    ]
    for title, source, to in plans:
        if bench.wants(*both(title)) and (big or "r128" not in title):
            path = source()
            work = partial(lorafmt.convert, path, bench.out, to=to, overwrite=True)
            rounds = bench.rounds if "r16" in title else min(bench.rounds, 5)
            bench.both(title, work, convert_command(path, to, bench.out), rounds)
    for rank in (16, 128) if big else (16,):
        source = partial(bench.sample, "kohya", rank, rank)
        measure = lambda source=source: private_peak(convert_command(source(), "diffusers", bench.out))  # noqa: E731
        bench.memory(f"private memory, r{rank}", measure)


#: Family -> the dialect of its sample, and another one: convolutions, fused attention, plain renames.
FAMILIES = {
    "sdxl": ("kohya", "diffusers"),
    "sd15": ("kohya", "diffusers"),
    "qwen-image": ("kohya", "diffusers"),
    "z-image": ("comfyui", "diffusers"),
    "wan-14b": ("kohya", "diffusers"),
    "hunyuan-video": ("kohya", "diffusers"),
    "flux2-dev": ("diffusers", "comfyui"),
}


def families(bench: Bench) -> None:
    """Files of all layers at rank 16: the conversion, and how long it takes to say what a file is."""
    import lorafmt

    for family, (own, other) in FAMILIES.items():
        title, known = f"{family} {own} -> {other} r16", f"lorafmt detect, {family} {own} r16"
        if not bench.wants(*both(title), known):
            continue
        path = bench.sample(own, 16, None, 0, family)
        work = partial(lorafmt.convert, path, bench.out, to=other, family=family, overwrite=True)
        bench.both(title, work, convert_command(path, other, bench.out, "--family", family))
        bench.median_of(known, run(BINARY, "detect", path))
        path.unlink()


def starts(bench: Bench, big: bool) -> None:
    bench.median_of("lorafmt --version", run(BINARY, "--version"))
    if big and bench.wants("lorafmt inspect, 1.2 GB"):
        bench.median_of("lorafmt inspect, 1.2 GB", run(BINARY, "inspect", bench.sample("kohya", 128, 128)))
    bench.median_of("python -c pass", run(sys.executable, "-c", "pass"))
    bench.median_of("python -c 'import lorafmt'", run(sys.executable, "-c", "import lorafmt"))


def compositions(bench: Bench) -> None:
    import lorafmt

    for count in (2, 4, 8):
        title = f"compose {count} x r16 -> diffusers"
        if bench.wants(*both(title)):
            loras = bench.loras(count)
            work = partial(lorafmt.compose, loras, bench.out, to="diffusers", overwrite=True)
            rounds = bench.rounds if count < 8 else min(bench.rounds, 5)
            bench.both(title, work, compose_command(loras, "diffusers", bench.out), rounds)
    measure = lambda: private_peak(compose_command(bench.loras(8), "diffusers", bench.out))  # noqa: E731
    bench.memory("private memory, compose 8 x r16", measure)


def natives(bench: Bench) -> None:
    convert, chain, scale = "kohya -> nunchaku r16", "compose 2 x r16 -> nunchaku", "scale a nunchaku file r16"
    memory = "private memory, nunchaku r16", "private memory, compose 2 x r16 -> nunchaku"
    if not bench.wants(*both(convert), *both(chain), *both(scale), *memory):
        return
    import lorafmt

    source, loras, out = bench.sample("kohya", 16, 16), bench.loras(2), bench.out
    options: dict[str, Any] = {"to": "nunchaku", "base": bench.base, "overwrite": True}
    convert_one = convert_command(source, "nunchaku", out, "--base", bench.base)
    compose_two = compose_command(loras, "nunchaku", out, "--base", bench.base)
    bench.both(convert, partial(lorafmt.convert, source, out, **options), convert_one)
    bench.both(chain, partial(lorafmt.compose, loras, out, **options), compose_two)
    made = bench.folder / "native.safetensors"
    lorafmt.convert(source, made, **options)
    command = [BINARY, "scale", made, "--strength", 0.7, "-o", out, "--force", "-q"]
    bench.both(scale, partial(lorafmt.scale, made, out, strength=0.7, overwrite=True), command)
    made.unlink()
    for name, command in zip(memory, (convert_one, compose_two), strict=True):
        bench.memory(name, partial(private_peak, command))


def tensors(bench: Bench) -> None:
    """Adapters behind a base that stays open, as a server has it. torch is imported no earlier than here."""
    fresh, again = "open base: r16 -> torch", "open base: r16 -> torch, out="
    memory = "private memory beside the tensors, open base: r16 -> torch"
    if not bench.wants(fresh, again, memory):
        return
    import lorafmt

    first, second = (path for path, _ in bench.loras(2))
    same = bench.folder / "native.safetensors"
    lorafmt.convert(second, same, to="nunchaku", base=bench.base, overwrite=True)
    base = lorafmt.Base.open(bench.base)
    state = base.to_torch(first)
    bench.against_cp(fresh, partial(base.to_torch, second), same)
    bench.against_cp(again, partial(base.to_torch, second, out=state), same)
    command = [sys.executable, "-c", WARM_MEMORY, str(bench.base), str(second)]
    bench.memory(
        memory,
        lambda: float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout),
    )
    same.unlink()


def peers(bench: Bench) -> None:
    """Whole processes of the peers that can be had."""
    source, out = bench.sample("kohya", 16, 16), bench.out
    mine = convert_command(source, "diffusers", out)
    bench.against_peer("diffusers, whole process, r16", [sys.executable, "-c", DIFFUSERS, source, out], mine)
    if path := os.environ.get("LORAFMT_BENCH_SD_SCRIPTS"):
        script = Path(path) / "networks/convert_flux_lora.py"
        dialects = ["--src", "sd-scripts", "--dst", "ai-toolkit"]
        files = ["--src_path", source, "--dst_path", out]
        command = ["env", f"PYTHONPATH={path}", sys.executable, script, *dialects, *files]
        bench.against_peer("sd-scripts, whole process, r16", command, mine)
    if path := os.environ.get("LORAFMT_BENCH_NUNCHAKU"):
        nunchaku(bench, path)


def nunchaku(bench: Bench, path: str) -> None:
    source, out, base = bench.sample("kohya", 16, 16), bench.out, ["--base", bench.base]

    def theirs(script: str, *arguments: object) -> list[object]:
        return [sys.executable, "-c", script, path, *arguments]

    def flat(loras: list[tuple[Path, float]]) -> list[object]:
        return [part for lora in loras for part in lora]

    convert = theirs(NUNCHAKU_CONVERT, source, out)
    bench.against_peer("nunchaku, whole process, r16", convert, convert_command(source, "diffusers", out))
    for count in (2, 4):
        loras = bench.loras(count)
        compose = theirs(NUNCHAKU_COMPOSE, out, *flat(loras))
        name = f"nunchaku, whole process, compose {count} x r16"
        bench.against_peer(name, compose, compose_command(loras, "diffusers", out))
    single = theirs(NUNCHAKU_NATIVE, bench.base, out, source, 1)
    name = "nunchaku, whole process, native r16"
    bench.against_peer(name, single, convert_command(source, "nunchaku", out, *base))
    loras = bench.loras(2)
    chain = theirs(NUNCHAKU_NATIVE, bench.base, out, *flat(loras))
    name = "nunchaku, whole process, compose 2 x r16 -> native"
    bench.against_peer(name, chain, compose_command(loras, "nunchaku", out, *base))
    bench.memory("nunchaku, private memory, native r16", lambda: private_peak(single))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="one round and nothing of rank 128: does it run at all?")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    import lorafmt

    big = not arguments.quick
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        bench = Bench(Path(name), 1 if arguments.quick else arguments.rounds, arguments.only)
        conversions(bench, big)
        starts(bench, big)
        # Makes room: the folder is memory.
        for path in bench.folder.glob("*-r128-*"):
            path.unlink()
        families(bench)
        compositions(bench)
        natives(bench)
        tensors(bench)
        if arguments.peers:
            peers(bench)
    document = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "version": lorafmt.__version__,
        "rounds": bench.rounds,
        "rows": bench.rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
