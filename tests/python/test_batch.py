"""Libraries of files: what is made, what is left alone, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

import lorafmt


def adapter(path: Path, seed: int = 0) -> Path:
    """A FLUX.1 file of one layer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = numpy.random.default_rng(seed)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    down, up = draw.standard_normal((2, 3072)), draw.standard_normal((3072, 2))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": numpy.array(1.0)}
    save_file({key: value.astype(numpy.float16) for key, value in tensors.items()}, path)
    return path


def tree(root: Path) -> dict[str, bytes]:
    """All files but the manifest."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "manifest.jsonl")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def lines(manifest: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for number, place in enumerate(("a.safetensors", "x/b.safetensors", "x/y/c.safetensors")):
        adapter(root / place, number)
    (root / "notes.txt").write_text("no adapter")
    return root


def test_outputs_mirror_the_tree_and_are_what_convert_writes(library: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = lorafmt.batch(
        library, tmp_path / "out", to="diffusers", progress=lambda done, files: seen.append((done, files))
    )
    assert (report.files, report.done, report.other_files, report.failed) == (3, 3, 1, 0)
    assert seen[-1] == (3, 3)
    made = tree(tmp_path / "out")
    assert set(made) == {"a.diffusers.safetensors", "x/b.diffusers.safetensors", "x/y/c.diffusers.safetensors"}
    lorafmt.convert(library / "x/b.safetensors", tmp_path / "one.safetensors", to="diffusers")
    assert made["x/b.diffusers.safetensors"] == (tmp_path / "one.safetensors").read_bytes()
    record = next(r for r in report if str(r["source"]).endswith("b.safetensors"))
    assert (record["family"], record["dialect"], record["kind"], record["ranks"]) == ("flux1", "kohya", "lora", [2])
    assert record["bytes"] == len(made["x/b.diffusers.safetensors"])


def test_a_second_run_does_what_is_missing_or_has_changed(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lorafmt.batch(library, out, to="diffusers")
    again = lorafmt.batch(library, out, to="diffusers")
    assert (again.done, again.unchanged) == (0, 3)

    adapter(library / "a.safetensors", 17)
    (out / "x/b.diffusers.safetensors").unlink()
    adapter(library / "new.safetensors", 18)
    report = lorafmt.batch(library, out, to="diffusers")
    assert (report.done, report.unchanged, report.failed) == (3, 1, 0)
    fresh = tmp_path / "fresh"
    lorafmt.batch(library, fresh, to="diffusers")
    assert tree(out) == tree(fresh)
    # Other options are other outputs, also under the same names.
    assert lorafmt.batch(library, out, to="diffusers", strength=0.5).done == 4
    assert lorafmt.batch(library, out, to="diffusers", strength=0.5).unchanged == 4
    # Two steps can share a folder.
    assert lorafmt.batch(library, out, to="comfyui").done == 4
    assert lorafmt.batch(library, out, to="diffusers", strength=0.5).unchanged == 4


def test_hashes_tell_where_times_do_not(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lorafmt.batch(library, out, to="diffusers", hash=True)
    times = {path: path.stat().st_mtime_ns for path in library.rglob("*.safetensors")}
    changed = library / "a.safetensors"
    adapter(changed, 5)
    os.utime(changed, ns=(times[changed], times[changed]))
    untouched = library / "x/b.safetensors"
    os.utime(untouched)
    assert lorafmt.batch(library, tmp_path / "other", to="diffusers").done == 3
    report = lorafmt.batch(library, out, to="diffusers", verify_hash=True, hash=True)
    assert (report.done, report.unchanged) == (1, 2)
    # An output that somebody has changed is made again, but only on request: it may be theirs.
    damaged = out / "x/b.diffusers.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    report = lorafmt.batch(library, out, to="diffusers", verify_hash=True, hash=True)
    assert [r["error"]["code"] for r in report.failures] == ["output-exists"]
    assert lorafmt.batch(library, out, to="diffusers", verify_hash=True, hash=True, overwrite=True).failed == 0
    assert damaged.read_bytes() == whole


def test_a_file_that_fails_stops_no_other(library: Path, tmp_path: Path) -> None:
    (library / "broken.safetensors").write_bytes((library / "a.safetensors").read_bytes()[:500])
    save_file({"model.weight": numpy.zeros((8, 8), numpy.float32)}, library / "model.safetensors")
    report = lorafmt.batch(library, tmp_path / "out", to="diffusers")
    assert (report.done, report.failed, report.skipped) == (3, 1, 1)
    codes = {Path(str(r["source"])).name: r["error"]["code"] for r in report.failures}
    assert codes["broken.safetensors"] == "truncated"
    assert all(r["error"]["hint"] for r in report.failures)
    # Failures are tried again.
    adapter(library / "broken.safetensors", 40)
    assert lorafmt.batch(library, tmp_path / "out", to="diffusers").done == 1


def test_stops_after_so_many_failures(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{number:02}.safetensors").write_bytes(b"nothing")
    report = lorafmt.batch(tmp_path / "in", tmp_path / "out", to="diffusers", max_failures=3, workers=1)
    assert (report.failed, report.left, report.stopped) == (3, 27, "too-many-failures")


def test_files_of_one_content_are_converted_once(library: Path, tmp_path: Path) -> None:
    shutil.copy(library / "a.safetensors", library / "x/copy of a.safetensors")
    out = tmp_path / "out"
    report = lorafmt.batch(library, out, to="diffusers")
    assert (report.done, report.linked) == (3, 1)
    one, other = out / "a.diffusers.safetensors", out / "x/copy of a.diffusers.safetensors"
    assert one.stat().st_ino == other.stat().st_ino
    duplicate = next(r for r in report if r["outcome"] == "linked")
    assert Path(str(duplicate["duplicate_of"])).stem in ("a", "copy of a")
    copied = lorafmt.batch(library, tmp_path / "copied", to="diffusers", duplicates="copy")
    assert copied.linked == 1 and (tmp_path / "copied/a.diffusers.safetensors").stat().st_nlink == 1
    assert lorafmt.batch(library, tmp_path / "each", to="diffusers", duplicates="convert").done == 4
    assert tree(out) == tree(tmp_path / "copied") == tree(tmp_path / "each")


def test_an_output_that_no_record_claims(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lorafmt.batch(library, out, to="diffusers")
    before = tree(out)
    (out / "manifest.jsonl").unlink()
    foreign = out / "a.diffusers.safetensors"
    foreign.write_bytes(b"somebody's")
    report = lorafmt.batch(library, out, to="diffusers")
    # Those that are what would be written are taken over, the other one is not touched.
    assert (report.done, report.failed) == (2, 1)
    assert report.failures[0]["error"]["code"] == "output-exists"
    assert foreign.read_bytes() == b"somebody's"
    assert lorafmt.batch(library, out, to="diffusers", overwrite=True).done == 3
    assert tree(out) == before


def test_two_sources_with_one_output_are_an_error_before_any_work(library: Path, tmp_path: Path) -> None:
    adapter(library / "x/a.safetensors", 9)
    with pytest.raises(lorafmt.UsageError, match="both be written") as caught:
        lorafmt.batch(library, tmp_path / "out", to="diffusers", name="{stem}.safetensors")
    assert "name" in caught.value.hint
    assert not (tmp_path / "out").exists()
    # The same file, named twice, is no collision.
    twice = lorafmt.batch([library, library], tmp_path / "out", to="diffusers")
    assert (twice.files, twice.done) == (4, 4)


def test_names_lists_and_patterns(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("# two of them\nin/a.safetensors\n\nin/x/b.safetensors\nin/gone.safetensors\n")
    report = lorafmt.batch([], "out", to="comfyui", files_from="list.txt", name="{dir}/{ending}-{stem}.safetensors")
    assert (report.done, report.failed) == (2, 1)
    assert set(tree(Path("out"))) == {"in/comfyui-a.safetensors", "in/x/comfyui-b.safetensors"}
    assert lorafmt.batch("in/**/?.safetensors", "g", to="comfyui").done == 3
    assert lorafmt.batch("in/x/*.safetensors", "h", to="comfyui").done == 1
    with pytest.raises(FileNotFoundError):
        lorafmt.batch("in/*.nothing", "i", to="comfyui")
    with pytest.raises(FileNotFoundError):
        lorafmt.batch("nowhere", "i", to="comfyui")
    with pytest.raises(lorafmt.UsageError, match="very folder"):
        lorafmt.batch("in", "in", to="comfyui")
    with pytest.raises(lorafmt.UsageError, match="braces"):
        lorafmt.batch("in", "i", to="comfyui", name="{rank}")


def test_links_loops_and_hidden_files(library: Path, tmp_path: Path) -> None:
    (library / "x/loop").symlink_to(library)
    (library / "linked.safetensors").symlink_to(library / "a.safetensors")
    (library / "dangling.safetensors").symlink_to(library / "nowhere")
    adapter(library / ".cache/h.safetensors")
    report = lorafmt.batch(library, tmp_path / "out", to="diffusers")
    assert (report.done + report.linked, report.failed) == (4, 1)
    assert [Path(str(r["source"])).name for r in report.failures] == ["dangling.safetensors"]
    assert not (tmp_path / "out/.cache").exists()


def test_the_other_steps(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lorafmt.batch(library, out / "small", op="resize", rank=1).done == 3
    info = lorafmt.inspect(out / "small/a.r1.safetensors")
    assert (info.dialect, info.rank) == ("kohya", 1)
    like = library / "a.safetensors"
    assert lorafmt.batch(library, out / "uniform", op="normalize", rank=4, like=like, to="diffusers").done == 3
    assert lorafmt.inspect(out / "uniform/a.r4.safetensors").rank == 4
    with pytest.raises(lorafmt.UsageError, match="all are to have"):
        lorafmt.batch(library, out / "n", op="normalize", rank=4)
    with pytest.raises(lorafmt.UsageError, match="the rank"):
        lorafmt.batch(library, out / "n", op="resize")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    text = "loras:\n  - {path: ../in/a.safetensors, strength: 0.5}\n  - {path: ../in/x/b.safetensors}\n"
    (recipes / "both.yaml").write_text(text)
    (recipes / "wrong.yaml").write_text("loras: 3\n")
    report = lorafmt.batch(recipes, out / "composed", op="compose", to="diffusers")
    assert (report.done, report.failed) == (1, 1)
    lorafmt.compose([(like, 0.5), (library / "x/b.safetensors", 1.0)], tmp_path / "one.safetensors", to="diffusers")
    made = (out / "composed/both.diffusers.safetensors").read_bytes()
    assert made == (tmp_path / "one.safetensors").read_bytes()


def test_a_manifest_as_a_table(library: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    report = lorafmt.batch(library, tmp_path / "out", to="diffusers", hash=True)
    report.to_parquet(tmp_path / "m.parquet")
    table = parquet.read_table(tmp_path / "m.parquet")
    assert table.num_rows == 3 and set(table["family"].to_pylist()) == {"flux1"}


def test_a_table_from_the_command_line(library: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out, table = tmp_path / "out", tmp_path / "records.parquet"
    line = [
        sys.executable,
        "-m",
        "lorafmt",
        "batch",
        library,
        "--to",
        "diffusers",
        "--out-dir",
        out,
        "--parquet",
        table,
    ]
    assert subprocess.run(line, check=False).returncode == 0
    assert parquet.read_table(table).num_rows == 3
    adapter(library / "d.safetensors", 9)
    assert subprocess.run(line, check=False).returncode == 0, "an older table is replaced"
    assert sorted(parquet.read_table(table)["outcome"].to_pylist()) == ["done"] * 4
    table.write_text("somebody's notes")
    refused = subprocess.run([*line, "--json"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2 and json.loads(refused.stdout)["error"]["code"] == "output-exists"
    assert table.read_text() == "somebody's notes"
    env = {**os.environ, "LORAFMT_PYTHON": "/nowhere/python"}
    lost = subprocess.run([*line, "--force"], check=False, capture_output=True, text=True, env=env)
    assert lost.returncode == 2 and "LORAFMT_PYTHON" in lost.stderr


# ------------------------------------------------------------------------------------------ killed


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, float]]:
    """200 files, the outputs of an undisturbed run, and how long that takes."""
    root = tmp_path_factory.mktemp("many")
    for number in range(200):
        adapter(root / f"in/{number % 7}/{number:03}.safetensors", number)
    started = time.monotonic()
    assert command(root / "in", root / "whole").wait() == 0
    yield root / "in", root / "whole", time.monotonic() - started
    shutil.rmtree(root)


def command(source: Path, out: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "lorafmt", "batch", source, "--to", "diffusers", "--out-dir", out, "-q"]
    return subprocess.Popen(list(map(os.fspath, line)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_any_moment_and_resumed(many: tuple[Path, Path, float], tmp_path: Path) -> None:
    source, whole, seconds = many
    draw = random.Random(6)
    cut = 0
    for number in range(20):
        out = tmp_path / str(number)
        process = command(source, out)
        time.sleep(draw.uniform(0.0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        manifest = out / "manifest.jsonl"
        text = manifest.read_text() if manifest.exists() else ""
        recorded = {json.loads(line)["source"] for line in text.splitlines(keepends=True) if line.endswith("\n")}
        cut += 0 < len(recorded) < 200
        # What has a final name is whole.
        for path, content in tree(out).items():
            if not Path(path).name.startswith(".lorafmt-"):
                assert content == (whole / path).read_bytes()
        assert command(source, out).wait() == 0
        left = {path: text for path, text in tree(out).items() if not Path(path).name.startswith(".lorafmt-")}
        assert left == tree(whole)
        counts = Counter(str(record["source"]) for record in lines(manifest))
        assert len(counts) == 200 and all(counts[path] == 1 for path in recorded)
        shutil.rmtree(out)
    assert cut > 0, "no run was cut off in its middle"


def test_an_unfinished_line_is_no_record(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lorafmt.batch(library, out, to="diffusers")
    manifest = out / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) - 40])
    report = lorafmt.batch(library, out, to="diffusers")
    assert (report.done, report.unchanged) == (1, 2)
    assert len(lines(manifest)) == 3


# ---------------------------------------------------------------------------- a full disk


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets writes fail as those to a full disk do."""
    made = tmp_path_factory.mktemp("shim") / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", source, "-o", made, "-ldl"], check=True)
    return made


def on_full_disk(shim: Path, under: Path, room: int, *line: object) -> subprocess.CompletedProcess[str]:
    env = {"LD_PRELOAD": str(shim), "FULL_DISK_UNDER": str(under), "FULL_DISK_BYTES": str(room)}
    words = [sys.executable, "-m", "lorafmt", *map(str, line)]
    return subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_a_full_disk_stops_the_run_and_room_resumes_it(full_disk: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for number in range(20):
        adapter(source / f"{number:02}.safetensors", number)
    size = (source / "00.safetensors").stat().st_size
    line = ["batch", source, "--to", "diffusers", "--out-dir", out]
    ended = on_full_disk(full_disk, out, 5 * size, *line, "--jobs", 1)
    assert ended.returncode == 3 and "no space left" in ended.stderr, ended.stderr
    some = tree(out)
    assert 0 < len(some) < 20 and not any(".lorafmt-" in name for name in some)
    failed = [record["error"] for record in lines(out / "manifest.jsonl") if record["outcome"] == "failed"]
    assert [error["code"] for error in failed] == ["disk-full"]  # type: ignore[index]
    # By the command, too: tables that other tests have registered here would make another step of it.
    resumed = on_full_disk(full_disk, out, 10**9, *line, "--json")
    report = json.loads(resumed.stdout.splitlines()[-1])
    assert (report["unchanged"], report["done"], report["failed"]) == (len(some), 20 - len(some), 0)
    assert command(source, tmp_path / "whole").wait() == 0
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_a_disk_without_room_for_the_manifest(full_disk: Path, tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "in/a.safetensors").parent, tmp_path / "out"
    ended = on_full_disk(full_disk, out / "manifest.jsonl", 10, "batch", source, "--to", "kohya", "--out-dir", out)
    assert ended.returncode == 2 and "manifest.jsonl" in ended.stderr, ended.stderr
    report = lorafmt.batch(source, out, to="kohya")
    assert (report.done, report.failed) == (1, 0)


# ---------------------------------------------------------------------------- files beside the sources


def peft(folder: Path, alpha: float, seed: int = 0) -> Path:
    """A PEFT folder of one layer, whose scale is in its configuration alone."""
    folder.mkdir(parents=True)
    draw = numpy.random.default_rng(seed)
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": draw.random((2, 3072)), f"{name}.lora_B.weight": draw.random((3072, 2))}
    save_file({k: v.astype(numpy.float32) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scale(path: Path) -> float:
    """What the file's product is, relative to that of the factors made above."""
    draw = numpy.random.default_rng(0)
    down, up = draw.random((2, 3072)), draw.random((3072, 2))
    with lorafmt.open(path) as made:
        delta = numpy.asarray(made["transformer_blocks.0.attn.to_q"].delta(), numpy.float64)
    return float(delta.sum() / (up @ down).sum())


def test_equal_factors_with_other_configurations_are_other_adapters(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for place, alpha in (("one", 2), ("half", 1), ("four", 8), ("again", 1)):
        peft(root / place, alpha)
    report = lorafmt.batch(root, tmp_path / "out", to="diffusers", workers=1)
    assert (report.done, report.linked) == (3, 1)
    for place, wanted in (("one", 1.0), ("half", 0.5), ("four", 4.0), ("again", 0.5)):
        assert scale(tmp_path / f"out/{place}/adapter_model.diffusers.safetensors") == pytest.approx(wanted, rel=1e-5)
    # A configuration that has changed makes its adapter anew, and no other.
    config = root / "four/adapter_config.json"
    config.write_text(config.read_text().replace("8", "6"))
    report = lorafmt.batch(root, tmp_path / "out", to="diffusers", workers=1)
    assert (report.done + report.linked, report.unchanged) == (1, 3)
    assert scale(tmp_path / "out/four/adapter_model.diffusers.safetensors") == pytest.approx(3.0, rel=1e-5)


def test_recipes_are_followed_to_their_adapters(library: Path, tmp_path: Path) -> None:
    text = "loras:\n  - {path: a.safetensors, strength: 0.5}\n"
    for place, seed in (("one", 1), ("two", 2)):
        adapter(tmp_path / "recipes" / place / "a.safetensors", seed)
        (tmp_path / "recipes" / place / "r.yaml").write_text(text)
    out = tmp_path / "out"
    report = lorafmt.batch(tmp_path / "recipes", out, op="compose", to="diffusers")
    # Equal texts about different files.
    assert (report.done, report.linked) == (2, 0)
    one, two = (out / place / "r.diffusers.safetensors" for place in ("one", "two"))
    assert one.read_bytes() != two.read_bytes()
    before = one.read_bytes()
    adapter(tmp_path / "recipes/one/a.safetensors", 3)
    report = lorafmt.batch(tmp_path / "recipes", out, op="compose", to="diffusers")
    assert (report.done, report.unchanged) == (1, 1)
    assert one.read_bytes() != before
    # A folder of PEFT's is its files: one that is written over is another ingredient.
    peft(tmp_path / "recipes/peft/lora", 2)
    (tmp_path / "recipes/peft/r.yaml").write_text("loras:\n  - {path: lora, strength: 1}\n")
    assert lorafmt.batch(tmp_path / "recipes", out, op="compose", to="diffusers").done == 1
    config = tmp_path / "recipes/peft/lora/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 4'))
    report = lorafmt.batch(tmp_path / "recipes", out, op="compose", to="diffusers")
    assert (report.done, report.unchanged) == (1, 2)
    assert scale(out / "peft/r.diffusers.safetensors") == pytest.approx(2.0, rel=1e-5)
