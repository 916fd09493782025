"""A batch on a Ray cluster.

The driver lists the library once; its plan is cut into shards, and a shard is a Ray task that works through its entries
as a run on one machine does. A task is given what the manifest knows of its entries and returns the records that it
adds, which the driver appends: so a run is resumed like a local one, whatever the machines. Ray starts a task again
when its worker is lost; outputs that the lost one had finished are then found equal and kept.

Sources and outputs must be reachable under one name from everywhere: a shared file system, or a store. A base that is
an address is fetched once to each machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import _lorafmt, hub, storage
from ._batch import BatchReport, FileProgress, local, records, report
from ._sources import usage_error
from .base import BaseLike, native_base

#: Seconds of work that a shard should hold: long against the start of a task, short against what a lost worker redoes.
SHARD_SECONDS = 15.0
#: Entries of the first shards, before the pace is known, and the most of any.
FIRST, MOST = 8, 4096
#: Shards in flight for each core of the cluster: one at work, and one more so that no core waits for the driver.
IN_FLIGHT = 2
#: How often Ray starts a task again whose worker is lost.
RETRIES = 5

_COUNTS = ("done", "linked", "unchanged", "skipped", "failed", "warned", "bytes")


def run(
    options: dict[str, Any], base: BaseLike | None, address: str | None, progress: FileProgress | None
) -> BatchReport:
    """Runs a batch on the cluster at ``address``, the one that the environment names, or one on this machine."""
    try:
        import ray
    except ImportError:
        raise usage_error("the engine is Ray, which is not installed", 'pip install "lorafmt[ray]"') from None
    if base is not None and not isinstance(base, str | os.PathLike):
        raise usage_error("every machine opens the base by itself", "pass its path or address, not a Base")
    if "-" in options["files_from"]:
        raise usage_error("standard input cannot be read here", "name a file")
    started = time.monotonic()
    plain = {key: value for key, value in options.items() if key not in ("sources", "files_from", "manifest", "plans")}
    manifest = Path(options["manifest"] or Path(options["out_dir"]) / "manifest.jsonl")
    if options["manifest"] is None and "://" in options["out_dir"]:
        raise usage_error("outputs go to a store, and records need a local file", "pass `manifest=`")
    on_driver = native_base(_on_this_machine(base))
    plan = _lorafmt.batch_plan(json.dumps(options), on_driver)
    del on_driver
    joined = not ray.is_initialized()
    if joined:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="error")
    try:
        totals = _drive(ray, plain, None if base is None else os.fspath(base), plan, manifest, progress)
    finally:
        if joined:
            ray.shutdown()
    through = sum(totals[name] for name in _COUNTS[:5])
    raw = {"schema": 1, "files": len(plan), **totals, "left": len(plan) - through, "manifest": str(manifest)}
    return report({**raw, "seconds": time.monotonic() - started})


def _drive(
    ray: Any,
    options: dict[str, Any],
    base: str | None,
    plan: list[str],
    manifest: Path,
    progress: FileProgress | None,
) -> dict[str, Any]:
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_shard)
    tables = ray.put(_lorafmt.tables())
    known = _known(manifest)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, running = deque(plan), {}
    totals: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    size, done = FIRST, 0
    manifest.parent.mkdir(parents=True, exist_ok=True)
    _whole_lines(manifest)
    with open(manifest, "a", encoding="utf-8") as journal:
        try:
            while waiting or running:
                while waiting and len(running) < cores * IN_FLIGHT and not totals.get("stopped"):
                    # The last shards get smaller, so that no machine works alone for long.
                    count = max(1, min(size, len(waiting) // (cores * IN_FLIGHT) or 1))
                    shard = [waiting.popleft() for _ in range(min(count, len(waiting)))]
                    past = [known[key] for key in map(_source, shard) if key in known]
                    running[
                        task.remote(tables, options, base, shard, "".join(line for lines in past for line in lines))
                    ] = shard
                if not running:
                    break
                ready, _ = ray.wait(list(running), timeout=1.0)
                for reference in ready:
                    shard = running.pop(reference)
                    added, summary = ray.get(reference)
                    journal.write(added)
                    journal.flush()
                    os.fsync(journal.fileno())
                    _add(totals, summary, options)
                    done += len(shard)
                    size = _pace(size, len(shard), summary["seconds"])
                if progress is not None:
                    progress(done, len(plan))
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            raise
    return totals


def _pace(size: int, files: int, seconds: float) -> int:
    """The size of the next shards, no more than twice the last."""
    wanted = int(files * SHARD_SECONDS / max(seconds, 1e-3))
    return max(1, min(wanted, 2 * size, MOST))


def _add(totals: dict[str, Any], summary: dict[str, Any], options: dict[str, Any]) -> None:
    for name in _COUNTS:
        totals[name] += summary[name]
    most = options["max_failures"]
    if most is not None and totals["failed"] >= max(1, most):
        totals["stopped"] = "too-many-failures"
    if summary.get("stopped"):
        totals["stopped"] = summary["stopped"]


def _source(entry: str) -> str:
    return json.loads(entry)["source"]


def _known(manifest: Path) -> dict[str, list[str]]:
    """Source -> lines of its records, for the tasks."""
    known: dict[str, list[str]] = {}
    if manifest.exists():
        for record in records(manifest):
            known.setdefault(record["source"], []).append(json.dumps(record) + "\n")
    return known


def _whole_lines(manifest: Path) -> None:
    """Cuts off what a killed run left of a line."""
    if manifest.exists():
        with open(manifest, "rb+") as file:
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)


def _shard(
    tables: list[str], options: dict[str, Any], base: str | None, entries: list[str], past: str
) -> tuple[str, dict[str, Any]]:
    """One task: works through entries, and returns the records that it added and the summary."""
    for table in tables:
        # A process of Ray's serves many tasks.
        if table not in _lorafmt.tables():
            _lorafmt.register_table(table)
    with tempfile.TemporaryDirectory() as folder:
        plan, manifest = Path(folder, "plan.jsonl"), Path(folder, "manifest.jsonl")
        plan.write_text("".join(entry + "\n" for entry in entries), encoding="utf-8")
        manifest.write_text(past, encoding="utf-8")
        asked = {**options, "sources": [], "files_from": [], "plans": [str(plan)], "manifest": str(manifest)}
        # The cluster's scheduler says how much runs at a time.
        asked["workers"] = asked["workers"] or 1
        done = local(asked, native_base(_on_this_machine(base)))
        added = manifest.read_text(encoding="utf-8")[len(past) :]
    return added, dict(done.raw)


def _on_this_machine(base: BaseLike | None) -> BaseLike | None:
    """A base that is an address, fetched to this machine once; every other one is opened where it is."""
    address = _lorafmt.address(base, False) if isinstance(base, str) and not os.path.exists(base) else None
    if not isinstance(base, str) or address is None:
        return base
    if address[0] == "hf":
        _, repo, revision, path = address
        return hub.fetch(repo, revision, path, {})[0]
    place = Path(tempfile.gettempdir(), "lorafmt-bases", hashlib.sha256(base.encode()).hexdigest()[:16])
    kept = place / base.rsplit("/", 1)[-1]
    if not kept.exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            # Tasks that come here at the same time all fetch it; each leaves a whole file.
            os.replace(storage.fetch(base, folder), kept)
    return str(kept)


def main(arguments: Iterable[str]) -> int:
    """What `lorafmt batch --engine ray` runs: options and base as JSON; prints the summary as JSON."""
    options, base, address = (json.loads(text) for text in arguments)
    print(json.dumps(dict(run(options, base, address, None).raw)))
    return 0
