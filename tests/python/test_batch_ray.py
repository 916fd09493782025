"""A library on a Ray cluster of this machine: the same outputs and records, also if a worker dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafmt
from test_batch import adapter, lines, tree

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for workers in /proc")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # Workers import the package under test.
    paths = os.pathsep.join([str(Path(lorafmt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for number in range(60):
        adapter(root / f"{number % 5}/{number:02}.safetensors", number)
    (root / "broken.safetensors").write_bytes(b"nothing")
    return root


def workers() -> list[int]:
    """Processes that are at work on a shard."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::_shard"):
                found.append(int(entry.name))
    return found


def test_a_worker_dies_in_the_middle(cluster: None, library: Path, tmp_path: Path) -> None:
    whole = lorafmt.batch(library, tmp_path / "whole", to="diffusers")
    assert (whole.done, whole.failed) == (60, 1)
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    out = tmp_path / "out"
    report = lorafmt.batch(library, out, to="diffusers", engine="ray", duplicates="convert")
    killer.join()
    assert killed, "no worker was seen"
    assert (report.files, report.done, report.failed, report.left) == (61, 60, 1, 0)
    assert {k: v for k, v in tree(out).items() if ".lorafmt-" not in k} == tree(tmp_path / "whole")
    records = lines(out / "manifest.jsonl")
    assert len(records) == len({record["source"] for record in records}) == 61

    # Resumed like a local run, and by one.
    again = lorafmt.batch(library, out, to="diffusers", engine="ray")
    assert (again.done, again.unchanged, again.failed) == (0, 60, 1)
    local = lorafmt.batch(library, out, to="diffusers")
    assert (local.done, local.unchanged, local.failed) == (0, 60, 1)


def test_the_command_starts_it(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "lorafmt", "batch", library, "--to", "comfyui", "--out-dir", out, "--engine", "ray"]
    done = subprocess.run([*map(os.fspath, line), "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["done"] == 60


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lorafmt.UsageError, match="standard input"):
        lorafmt.batch([], tmp_path / "out", to="diffusers", files_from="-", engine="ray")
    with pytest.raises(lorafmt.UsageError, match="engine"):
        lorafmt.batch([], tmp_path / "out", to="diffusers", engine="slurm")
