"""`hf://` against a hub on this machine: its routes, its cache as `huggingface_hub` has it, and what networks do."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafmt
from bases import BaseSpec, make_base
from generate import KOHYA
from localhub import Fault, LocalHub, Repo
from loras import MODULES, flat, lora
from remotes import Place

FILE = "sub/style.safetensors"
ADDRESS = f"hf://user/repo/{FILE}"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "style.safetensors"
    lora(path, MODULES, alpha=2.0)
    return path.read_bytes()


@pytest.fixture
def hub(content: bytes) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.repos["user/repo"] = Repo()
        hub.repos["user/repo"].commit({FILE: content, "README.md": b"# Style\n"})
        yield hub


@pytest.fixture
def place(hub: LocalHub, tmp_path: Path) -> Place:
    return Place(tmp_path, {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")})


def cache(place: Place) -> Path:
    return place.folder / "hf" / "hub"


def blobs(place: Place) -> list[str]:
    """Everything under the names of blobs, whole or not."""
    return sorted(path.name for path in cache(place).glob("models--*/blobs/*"))


def test_what_is_fetched_is_what_is_there_and_lies_as_the_python_library_lays_it(
    hub: LocalHub, place: Place, content: bytes
) -> None:
    (place.folder / "local.safetensors").write_bytes(content)
    place.run("convert", "local.safetensors", "--to", "kohya")
    report = place.document("convert", ADDRESS, "--to", "kohya")
    assert report["target"]["path"] == "style.kohya.safetensors"
    assert report["source"]["path"] == ADDRESS
    sha256 = hashlib.sha256(content).hexdigest()
    assert report["source"]["sha256"] == sha256
    made, wanted = (place.folder / f"{name}.kohya.safetensors" for name in ("style", "local"))
    assert made.read_bytes() == wanted.read_bytes()

    repo, commit = cache(place) / "models--user--repo", hub.repos["user/repo"].revisions["main"]
    pointer = repo / "snapshots" / commit / FILE
    assert pointer.is_symlink() and not pointer.readlink().is_absolute()
    assert pointer.resolve() == (repo / "blobs" / sha256).resolve()
    assert (repo / "refs" / "main").read_text() == commit
    assert blobs(place) == [sha256]

    # A second run asks what the branch is now, and fetches nothing.
    before = hub.sent()
    place.run("convert", "user/repo/sub/style.safetensors", "--to", "bfl")
    assert hub.sent() == before


@pytest.mark.parametrize("first", ["lorafmt", "huggingface_hub"])
def test_the_cache_is_one_with_the_python_library(hub: LocalHub, place: Place, first: str) -> None:
    pytest.importorskip("huggingface_hub")
    fetch = f"import json, huggingface_hub as h; print(json.dumps(h.hf_hub_download('user/repo', {FILE!r})))"
    if first == "lorafmt":
        place.run("check", ADDRESS)
        path = place.python(fetch, HF_HUB_OFFLINE="1")
    else:
        path = place.python(fetch)
        hub.seen.clear()
        assert place.document("inspect", ADDRESS, HF_HUB_OFFLINE="1")["family"] == "flux1"
        place.run("check", ADDRESS)
        assert hub.sent() == 0
    assert Path(path).resolve().parent == (cache(place) / "models--user--repo" / "blobs").resolve()
    assert len(blobs(place)) == 1


def test_each_problem_has_its_code_and_says_what_helps(hub: LocalHub, place: Place, content: bytes) -> None:
    for name, repo in {"user/gated": Repo(gated=True), "user/private": Repo(token="hf_good")}.items():
        repo.commit({FILE: content})
        hub.repos[name] = repo
    cases = [
        (f"hf://user/nothing/{FILE}", {}, "repo-not-found", "HF_TOKEN"),
        (f"hf://user/private/{FILE}", {}, "repo-not-found", "HF_TOKEN"),
        (f"hf://user/repo@v9/{FILE}", {}, "revision-not-found", "branch"),
        ("hf://user/repo/other.safetensors", {}, "not-found", FILE),
        (f"hf://user/gated/{FILE}", {}, "gated-repo", "conditions"),
        (f"hf://user/gated/{FILE}", {"HF_TOKEN": "hf_good"}, "gated-repo", f"{hub.url}/user/gated"),
        (ADDRESS, {"HF_TOKEN": "hf_wrong"}, "unauthorized", "hf auth login"),
        (ADDRESS, {"HF_HUB_OFFLINE": "1"}, "offline", f"hf download user/repo {FILE}"),
        (ADDRESS, {"HF_ENDPOINT": "http://127.0.0.1:9", "LORAFMT_RETRIES": "0"}, "network", "connection"),
        (ADDRESS, {"HF_ENDPOINT": hub.cdn}, "repo-not-found", ""),
        ("hf://user", {}, "invalid-address", "hf://"),
        ("hf://datasets/user/repo/a.safetensors", {}, "invalid-address", "hf://"),
        ("gs://bucket/a.safetensors", {}, "invalid-address", "s3://"),
    ]
    for number, (address, variables, code, hint) in enumerate(cases):
        # One looks at the header, the other fetches the file.
        error = place.error(("detect", "check")[number % 2], address, **variables)
        assert error["code"] == code, (address, error)
        assert hint in error["hint"], error
        assert error["path"] == address or code == "invalid-address", error
    assert blobs(place) == []


def test_a_token_opens_what_is_private_and_goes_to_the_hub_alone(hub: LocalHub, place: Place, content: bytes) -> None:
    hub.repos["user/private"] = Repo(token="hf_good")
    hub.repos["user/private"].commit({FILE: content})
    place.run("check", f"hf://user/private/{FILE}", HF_TOKEN="hf_good")
    (place.folder / "hf").mkdir(exist_ok=True)
    (place.folder / "hf" / "token").write_text("hf_good\n")
    place.run("check", f"hf://user/private@main/{FILE}")
    assert {seen.authorization for seen in hub.seen if seen.server == "hub"} == {"Bearer hf_good"}
    assert {seen.authorization for seen in hub.seen if seen.server == "cdn"} == {None}


PASSING = {
    "500": [Fault("status"), Fault("status", 503)],
    "429": [Fault("status", 429)],
    "reset": [Fault("reset", at=200_000)],
    "reset at once": [Fault("reset", at=0)],
    "cut off, again and again": [Fault("truncate", at=50_000)] * 5,
    "slow": [Fault("slow", seconds=0.002)],
    "stall": [Fault("stall", at=100_000, seconds=1.5)],
    "damage": [Fault("corrupt", at=70_000)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(hub: LocalHub, place: Place, content: bytes, faults: list[Fault]) -> None:
    hub.faults = list(faults)
    place.run("check", ADDRESS, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert not hub.faults
    name = hashlib.sha256(content).hexdigest()
    assert blobs(place) == [name]
    assert (cache(place) / "models--user--repo" / "blobs" / name).read_bytes() == content


def test_a_download_goes_on_where_it_broke_off(hub: LocalHub, place: Place, content: bytes) -> None:
    hub.faults = [Fault("truncate", at=100_000), Fault("truncate", at=100_000)]
    place.run("check", ADDRESS)
    assert [seen.range for seen in hub.gets()] == [None, "bytes=100000-", "bytes=200000-"]
    assert hub.sent() == len(content)


def test_a_server_without_ranges_begins_again(hub: LocalHub, place: Place, content: bytes) -> None:
    hub.ranges = False
    hub.faults = [Fault("truncate", at=100_000)]
    place.run("check", ADDRESS)
    assert hub.sent() == len(content) + 100_000


LASTING = {
    "500": (Fault("status"), "server-error"),
    "damage": (Fault("corrupt", at=70_000), "corrupt-download"),
    "cut off at once": (Fault("truncate", at=0), "network"),
    "refused": (Fault("status", 403), "forbidden"),
}


@pytest.mark.parametrize(("fault", "code"), LASTING.values(), ids=LASTING)
def test_what_lasts_is_said_and_leaves_nothing(hub: LocalHub, place: Place, fault: Fault, code: str) -> None:
    hub.always = fault
    assert place.error("check", ADDRESS, LORAFMT_RETRIES="1")["code"] == code
    assert blobs(place) == []
    assert not list(cache(place).glob("models--*/snapshots/*/*/*"))


def test_failures_of_the_hub_itself_are_tried_again_or_said(hub: LocalHub, place: Place) -> None:
    hub.hub_faults = [Fault("status", 502), Fault("reset")]
    place.run("check", ADDRESS)
    hub.hub_faults = [Fault("status", 502)] * 9
    # With a cached file one question is enough.
    place.run("check", ADDRESS)
    assert len(hub.hub_faults) == 8
    assert place.error("check", "hf://user/repo/other.safetensors", LORAFMT_RETRIES="1")["code"] == "server-error"


def test_revisions_are_pinned(hub: LocalHub, place: Place, content: bytes) -> None:
    repo = hub.repos["user/repo"]
    old = repo.revisions["main"]
    repo.revisions["v1.0"] = old
    repo.revisions["refs/pr/7"] = old
    repo.commit({FILE: content[:-2] + b"\0\0"})
    digest = hashlib.sha256(content).hexdigest()
    for revision in (old, "v1.0", "refs/pr/7"):
        report = place.document("convert", f"hf://user/repo@{revision}/{FILE}", "--to", "bfl", "--force")
        assert report["source"]["sha256"] == digest
    report = place.document("convert", ADDRESS, "--to", "bfl", "--force")
    assert report["source"]["sha256"] != digest
    # A commit never changes: nobody is asked about it any more.
    hub.seen.clear()
    place.run("check", f"hf://user/repo@{old}/{FILE}")
    assert hub.seen == []


def test_a_repository_is_its_adapter_or_all_of_them(hub: LocalHub, place: Place, content: bytes) -> None:
    assert place.document("detect", "hf://user/repo")["path"] == ADDRESS
    many = {f"{name}.safetensors": content for name in ("a", "b/c", "b/d", "b/e/f")}
    hub.repos["user/many"] = Repo()
    hub.repos["user/many"].commit({**many, "b/notes.txt": b"none"})
    error = place.error("detect", "hf://user/many")
    assert error["code"] == "ambiguous-address" and "b/e/f.safetensors" in error["hint"]
    assert place.document("detect", "hf://user/many/b/e")["path"] == "hf://user/many/b/e/f.safetensors"
    found = place.document("detect", "-r", "hf://user/many/b")
    assert [f["path"] for f in found] == [f"hf://user/many/b/{n}.safetensors" for n in ("c", "d", "e/f")]
    place.run("convert", "-r", "hf://user/many", "--to", "bfl", "--out-dir", "out")
    made = {str(path.relative_to(place.folder / "out")) for path in (place.folder / "out").rglob("*.safetensors")}
    assert made == {f"{name.removesuffix('.safetensors')}.bfl.safetensors" for name in many}
    # What is in the cache can be listed without the network.
    offline = place.document("detect", "-r", "hf://user/many/b", HF_HUB_OFFLINE="1")
    assert [f["path"] for f in offline] == [f["path"] for f in found]
    hub.repos["user/many"].commit({**many, "pytorch_lora_weights.safetensors": content})
    assert place.document("detect", "hf://user/many")["path"].endswith("/pytorch_lora_weights.safetensors")


def test_looking_reads_headers_and_alphas_only(hub: LocalHub, place: Place) -> None:
    place.run("sample", "--family", "flux1", "--dialect", "kohya", "--rank", "4", "-o", "big.safetensors")
    big = (place.folder / "big.safetensors").read_bytes()
    hub.repos["user/repo"].commit({"big.safetensors": big})
    for command in ("detect", "inspect"):
        hub.seen.clear()
        near = place.document(command, "big.safetensors")
        far = place.document(command, "hf://user/repo/big.safetensors")
        assert far.pop("path") == "hf://user/repo/big.safetensors"
        near.pop("path")
        assert near == far
        assert hub.sent() < len(big) / 20
    assert blobs(place) == []
    # A failure on the way is no other answer.
    hub.faults = [Fault("status"), Fault("truncate", at=3)]
    hub.seen.clear()
    again = place.document("inspect", "hf://user/repo/big.safetensors")
    again.pop("path")
    assert again == far and not hub.faults


def test_python_looks_at_no_more(hub: LocalHub, place: Place) -> None:
    place.run("sample", "--family", "flux1", "--dialect", "kohya", "--rank", "4", "-o", "big.safetensors")
    big = (place.folder / "big.safetensors").read_bytes()
    hub.repos["user/repo"].commit({"big.safetensors": big})
    hub.seen.clear()
    code = """
import json, lorafmt
near = lorafmt.inspect("big.safetensors").to_dict()
far = lorafmt.inspect("user/repo", weight_name="big.safetensors", revision="main").to_dict()
print(json.dumps([near.pop("path"), far.pop("path"), near == far, lorafmt.detect("user/repo/big.safetensors").family]))
"""
    assert place.python(code) == ["big.safetensors", "hf://user/repo@main/big.safetensors", True, "flux1"]
    assert hub.sent() < len(big) / 20
    assert blobs(place) == []


def test_a_base_by_address(hub: LocalHub, place: Place, content: bytes) -> None:
    base = make_base(place.folder / "base.safetensors", BaseSpec(1, 1, rank=16, layout="v1"))
    (place.folder / "style.safetensors").write_bytes(content)
    hub.repos["user/repo"].commit({"base.safetensors": base.read_bytes()})
    place.run(
        "convert", "style.safetensors", "--to", "nunchaku", "--base", "base.safetensors", "-o", "near.safetensors"
    )
    far = "hf://user/repo/base.safetensors"
    place.run("convert", "style.safetensors", "--to", "nunchaku", "--base", far, "-o", "far.safetensors")
    near = (place.folder / "near.safetensors").read_bytes()
    assert (place.folder / "far.safetensors").read_bytes() == near
    pytest.importorskip("huggingface_hub")
    code = f"""
import json, lorafmt
lorafmt.convert("style.safetensors", "again.safetensors", to="nunchaku", base={far!r})
print(json.dumps(lorafmt.Base.open({far!r}).path))
"""
    assert place.python(code) == far
    assert (place.folder / "again.safetensors").read_bytes() == near


def test_recipes_in_folders_name_addresses(place: Place, content: bytes) -> None:
    """An address is one wherever the recipe lies, in `compose` and in a batch."""
    (place.folder / "near.safetensors").write_bytes(content)
    recipes = place.folder / "recipes"
    recipes.mkdir()
    for name, path in (("far", ADDRESS), ("near", "../near.safetensors")):
        (recipes / f"{name}.yaml").write_text(f"loras:\n  - {{path: '{path}', strength: 0.5}}\n")
    place.run("batch", "recipes", "--op", "compose", "--to", "kohya", "--out-dir", "out")
    far, near = ((place.folder / f"out/{name}.kohya.safetensors").read_bytes() for name in ("far", "near"))
    assert far == near
    place.run("compose", "--recipe", "recipes/far.yaml", "--to", "kohya", "-o", "one.safetensors")
    with (
        lorafmt.open(place.folder / "one.safetensors") as one,
        lorafmt.open(place.folder / "near.safetensors") as whole,
    ):
        assert set(one) == set(whole)


def test_measuring_reads_all(hub: LocalHub, place: Place, content: bytes) -> None:
    (place.folder / "near.safetensors").write_bytes(content)
    near, far = (place.document("inspect", "--weights", name)["weights"] for name in ("near.safetensors", ADDRESS))
    assert near == far
    assert len(blobs(place)) == 1


def test_damaged_headers_are_said_as_of_local_files(hub: LocalHub, place: Place, content: bytes) -> None:
    files = {
        "truncated": content[:-1],
        "not-safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n" * 3,
        "pickle-file": b"PK\x03\x04" + bytes(100),
        "header-too-large": (1 << 20).to_bytes(8, "little") + b"{" + bytes(50),
    }
    hub.repos["user/repo"].commit({f"{code}.safetensors": body for code, body in files.items()})
    for code in files:
        assert place.error("inspect", f"hf://user/repo/{code}.safetensors")["code"] == code


def test_two_processes_fetch_a_file_once(hub: LocalHub, place: Place, content: bytes) -> None:
    hub.faults = [Fault("slow", seconds=0.005)]
    running = [place.start("check", ADDRESS) for _ in range(3)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, (out, err)
    assert hub.sent() == len(content)
    assert blobs(place) == [hashlib.sha256(content).hexdigest()]


def test_ctrl_c_leaves_nothing(hub: LocalHub, place: Place) -> None:
    hub.always = Fault("stall", at=100_000, seconds=3)
    process = place.start("check", ADDRESS)
    deadline = time.monotonic() + 30
    while hub.sent() < 100_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [name.rpartition(".")[2] for name in blobs(place)] == ["incomplete"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert blobs(place) == []


def test_the_configuration_beside_a_file_counts(hub: LocalHub, place: Place) -> None:
    folder = place.folder / "peft"
    folder.mkdir()
    spell = lambda path: f"base_model.model.{path}"  # noqa: E731
    lora(folder / "adapter_model.safetensors", MODULES, spell)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    files = {f"x/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repos["user/peft"] = Repo()
    hub.repos["user/peft"].commit(files)
    near = place.document("inspect", "peft", "--family", "flux1")
    far = place.document("inspect", "hf://user/peft", "--family", "flux1")
    for key in ("alphas", "scales", "kind", "dialect", "ranks"):
        assert near.get(key) == far.get(key)
    place.run("convert", "hf://user/peft", "--to", "bfl", "--family", "flux1")
    place.run("convert", "peft", "--to", "bfl", "--family", "flux1", "-o", "near.safetensors")
    made = place.folder / "peft.bfl.safetensors"
    assert made.read_bytes() == (place.folder / "near.safetensors").read_bytes()


def test_offline_the_cache_has_to_know_the_configuration(hub: LocalHub, place: Place) -> None:
    """Without it the scale would be a guess."""
    pytest.importorskip("huggingface_hub")
    path = place.folder / "adapter_model.safetensors"
    lora(path, MODULES, lambda module: f"base_model.model.{module}")
    adapter, config = path.read_bytes(), json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}).encode()
    for name, more in {"user/with": {"adapter_config.json": config}, "user/without": {}}.items():
        hub.repos[name] = Repo()
        hub.repos[name].commit({path.name: adapter, **more})
    path.unlink()
    names = ["user/with", "user/without"]
    fetch = (
        f"import huggingface_hub as h\nfor n in {names}: h.hf_hub_download(n, 'adapter_model.safetensors')\nprint(0)"
    )
    place.python(fetch)
    look = ("inspect", "--family", "flux1")
    for name in names:
        assert place.error(*look, f"hf://{name}", HF_HUB_OFFLINE="1")["code"] == "offline"
        online = place.document(*look, f"hf://{name}")
        assert place.document(*look, f"hf://{name}", HF_HUB_OFFLINE="1") == online
    script = (
        f"import json, lorafmt as l\nprint(json.dumps([l.detect('hf://' + n, family='flux1').family for n in {names}]))"
    )
    assert place.python(script, HF_HUB_OFFLINE="1") == ["flux1", "flux1"]


def test_strengths_and_recipes_take_addresses(hub: LocalHub, place: Place, content: bytes) -> None:
    (place.folder / "local.safetensors").write_bytes(content)
    place.run("compose", "local.safetensors:0.5", "local.safetensors:2", "-o", "near.safetensors")
    place.run("compose", f"{ADDRESS}:0.5", f"user/repo/{FILE}:2", "-o", "far.safetensors")
    place.run("diff", "near.safetensors", "far.safetensors")
    folder = place.folder / "recipes"
    folder.mkdir()
    (folder / "mix.yaml").write_text(f"loras:\n  - {ADDRESS}:0.5\n  - {{path: user/repo/{FILE}, strength: 2}}\n")
    place.run("compose", "--recipe", "recipes/mix.yaml", "-o", "mixed.safetensors")
    place.run("diff", "near.safetensors", "mixed.safetensors")


def test_a_local_path_wins(hub: LocalHub, place: Place, content: bytes) -> None:
    local = place.folder / "user" / "repo" / FILE
    assert place.document("detect", f"user/repo/{FILE}")["path"] == ADDRESS
    local.parent.mkdir(parents=True)
    # The folder is there, so a path was meant.
    assert place.error("detect", "user/repo/missing.safetensors")["code"] == "not-found"
    local.write_bytes(content)
    hub.seen.clear()
    assert place.document("detect", f"user/repo/{FILE}")["path"] == f"user/repo/{FILE}"
    assert hub.seen == []


PYTHON = """
import json, lorafmt
out = {}
def code(name, *args, **options):
    try:
        lorafmt.open(*args, **options)
        out[name] = None
    except lorafmt.LorafmtError as error:
        bases = [t.__name__ for t in type(error).__mro__]
        out[name] = [error.code, [b for b in ("PermissionError", "ConnectionError", "FileNotFoundError") if b in bases]]
FILE = "sub/style.safetensors"
with lorafmt.open("hf://user/repo/" + FILE) as a:
    out["family"], out["modules"] = a.family, len(a)
out["weight_name"] = lorafmt.inspect("user/repo", weight_name="style.safetensors", subfolder="sub").path
out["short"] = lorafmt.detect("user/repo/" + FILE, revision="main")["path"]
out["one"] = lorafmt.convert("user/repo", "out.safetensors", to="kohya", token=False, revision="main").source_path
code("repo", "user/nothing/" + FILE)
code("revision", "user/repo/" + FILE, revision="v9")
code("file", "user/repo", weight_name="other.safetensors")
code("gated", "hf://user/gated/" + FILE)
code("offline", "hf://user/repo@v9/" + FILE, local_files_only=True)
code("two", "hf://user/repo@main/" + FILE, revision="other")
code("local", "nowhere.safetensors")
code("bytes", b"", revision="main")
try:
    lorafmt.open("hf://user/repo/" + FILE, wieght_name="x")
except TypeError as error:
    out["typo"] = str(error)
print(json.dumps(out))
"""


def test_python_takes_addresses_and_diffusers_words(hub: LocalHub, place: Place, content: bytes) -> None:
    pytest.importorskip("huggingface_hub")
    hub.repos["user/gated"] = Repo(gated=True)
    hub.repos["user/gated"].commit({FILE: content})
    out = place.python(PYTHON)
    assert (out["family"], out["modules"]) == ("flux1", len(MODULES))
    assert {out["weight_name"], out["short"]} == {ADDRESS, f"hf://user/repo@main/{FILE}"}
    assert out["one"].endswith(FILE) and (place.folder / "out.safetensors").is_file()
    assert out["repo"] == ["repo-not-found", ["FileNotFoundError"]]
    assert out["revision"] == ["revision-not-found", ["FileNotFoundError"]]
    assert out["file"] == ["not-found", ["FileNotFoundError"]]
    assert out["gated"] == ["gated-repo", ["PermissionError"]]
    assert out["offline"] == ["offline", ["ConnectionError"]]
    assert out["two"][0] == out["bytes"][0] == "invalid-argument"
    assert out["local"] == ["not-found", ["FileNotFoundError"]]
    assert "wieght_name" in out["typo"]


def test_python_says_which_package_is_missing(hub: LocalHub, place: Place) -> None:
    script = """
import json, sys
sys.modules.update(huggingface_hub=None, fsspec=None)
import lorafmt
out = []
for src in ("hf://user/repo/a.safetensors", "s3://bucket/a.safetensors"):
    try:
        lorafmt.open(src)
    except ImportError as error:
        out.append([error.code, error.hint])
print(json.dumps(out))
"""
    wanted = [["missing-package", f"`pip install {name}`"] for name in ("huggingface_hub", "fsspec")]
    assert place.python(script) == wanted


def test_kohya_alphas_are_read_by_ranges(hub: LocalHub, place: Place, tmp_path: Path) -> None:
    path = tmp_path / "kohya.safetensors"
    lora(path, {m: 64 for m in MODULES if "attn" not in m}, flat("lora_unet_"), KOHYA, alpha=3.0)
    hub.repos["user/repo"].commit({"kohya.safetensors": path.read_bytes()})
    near, far = (place.document("inspect", name) for name in (str(path), "hf://user/repo/kohya.safetensors"))
    near.pop("path"), far.pop("path")
    assert near == far
