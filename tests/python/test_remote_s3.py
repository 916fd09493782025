"""`s3://` against moto's server: addresses, ranges, credentials, errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from loras import MODULES, lora
from remotes import Place

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
ADDRESS = "s3://bucket/in/style.safetensors"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def client(endpoint: str) -> Any:
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def place(endpoint: str, tmp_path: Path) -> Place:
    return Place(tmp_path, {**KEYS, "AWS_ENDPOINT_URL": endpoint})


@pytest.fixture
def content(client: Any, tmp_path: Path) -> bytes:
    lora(tmp_path / "local.safetensors", MODULES, alpha=2.0)
    content = (tmp_path / "local.safetensors").read_bytes()
    for name in ("style", "more/other"):
        client.put_object(Bucket="bucket", Key=f"in/{name}.safetensors", Body=content)
    return content


def test_objects_are_read_as_files_are(place: Place, content: bytes) -> None:
    near = place.document("inspect", "local.safetensors")
    far = place.document("inspect", ADDRESS)
    assert (near.pop("path"), far.pop("path")) == ("local.safetensors", ADDRESS)
    assert near == far
    report = place.document("convert", ADDRESS, "--to", "kohya")
    assert report["source"] == {**report["source"], "path": ADDRESS, "sha256": hashlib.sha256(content).hexdigest()}
    place.run("convert", "local.safetensors", "--to", "kohya")
    made, wanted = (place.folder / f"{name}.kohya.safetensors" for name in ("style", "local"))
    assert made.read_bytes() == wanted.read_bytes()
    # Nothing stays behind.
    temporary = place.folder / "tmp"
    temporary.mkdir()
    place.run("check", ADDRESS, TMPDIR=str(temporary))
    assert list(temporary.iterdir()) == []


def test_a_prefix_is_a_folder(place: Place, content: bytes) -> None:
    found = place.document("detect", "-r", "s3://bucket/in/")
    assert [f["path"] for f in found] == ["s3://bucket/in/more/other.safetensors", ADDRESS]
    place.run("convert", "-r", "s3://bucket/in", "--to", "bfl", "--out-dir", "out")
    made = {str(path.relative_to(place.folder / "out")) for path in (place.folder / "out").rglob("*.safetensors")}
    assert made == {"style.bfl.safetensors", "more/other.bfl.safetensors"}


def test_looking_reads_little(place: Place, client: Any) -> None:
    place.run("sample", "--family", "flux1", "--dialect", "kohya", "--rank", "4", "-o", "big.safetensors")
    client.upload_file(str(place.folder / "big.safetensors"), "bucket", "big.safetensors")
    near = place.document("inspect", "big.safetensors")
    # Whatever is fetched as a whole needs a temporary file, and there is no room for one.
    far = place.document("inspect", "s3://bucket/big.safetensors", TMPDIR=str(place.folder / "nowhere"))
    near.pop("path"), far.pop("path")
    assert near == far


def test_profiles_and_anonymous_requests(place: Place, content: bytes, endpoint: str, client: Any) -> None:
    folder = place.folder / ".aws"
    folder.mkdir()
    (folder / "credentials").write_text("[work]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    (folder / "config").write_text(f"[profile work]\nendpoint_url = {endpoint}\nregion = us-east-1\n")
    nothing = dict.fromkeys([*KEYS, "AWS_ENDPOINT_URL"], "")
    assert place.document("detect", ADDRESS, **{**nothing, "AWS_PROFILE": "work"})["family"] == "flux1"
    nobody = {**nothing, "AWS_ENDPOINT_URL": endpoint}
    error = place.error("detect", ADDRESS, **nobody)
    assert (error["code"], "AWS_PROFILE" in error["hint"]) == ("unauthorized", True)
    client.put_object(Bucket="bucket", Key="public.safetensors", Body=content, ACL="public-read")
    assert place.document("detect", "s3://bucket/public.safetensors", **nobody)["family"] == "flux1"
    error = place.error("detect", ADDRESS, **{**nothing, "AWS_PROFILE": "other"})
    assert (error["code"], "AWS_PROFILE" in error["hint"]) == ("unauthorized", True)
    error = place.error("detect", ADDRESS, AWS_SECRET_ACCESS_KEY="")
    assert error["code"] == "unauthorized"


def test_each_problem_has_its_code(place: Place, content: bytes) -> None:
    cases = [
        ("s3://bucket/in/missing.safetensors", {}, "not-found"),
        ("s3://no-such-bucket/a.safetensors", {}, "bucket-not-found"),
        ("s3://bucket//a.safetensors", {}, "invalid-address"),
        ("s3://bucket/in/", {}, "not-found"),
        (ADDRESS, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "LORAFMT_RETRIES": "0"}, "network"),
        (ADDRESS, {"LORAFMT_RETRIES": "many"}, "invalid-argument"),
    ]
    for command in ("check", "inspect"):
        for address, variables, code in cases:
            assert place.error(command, address, **variables)["code"] == code, (command, address)


def test_python_reads_any_address_through_fsspec(place: Place, content: bytes) -> None:
    pytest.importorskip("fsspec")
    script = """
import json, fsspec, lorafmt
content = open("local.safetensors", "rb").read()
with fsspec.open("memory://folder/style.safetensors", "wb") as file:
    file.write(content)
out = {"path": lorafmt.inspect("memory://folder/style.safetensors").path}
out["same"] = lorafmt.diff("memory://folder/style.safetensors", "local.safetensors").equal
out["errors"] = []
for src in ("memory://folder/missing.safetensors", "nothing://a/b.safetensors", "s3://bucket/missing.safetensors"):
    try:
        lorafmt.open(src)
    except lorafmt.LorafmtError as error:
        out["errors"].append(error.code)
print(json.dumps(out))
"""
    out = place.python(script)
    assert out["path"] == "memory://folder/style.safetensors" and out["same"] is True
    assert out["errors"][:2] == ["not-found", "invalid-address"]
    # With s3fs the object is missing, without it the package is.
    assert out["errors"][2] in ("not-found", "missing-package")


def test_python_reads_s3_through_s3fs(place: Place, content: bytes) -> None:
    pytest.importorskip("s3fs")
    script = f"""
import json, lorafmt
with lorafmt.open({ADDRESS!r}) as a:
    values = a.to_numpy()
print(json.dumps([a.family, len(values), lorafmt.diff(a, "local.safetensors").equal]))
"""
    family, tensors, equal = place.python(script)
    assert (family, equal) == ("flux1", True) and tensors > 0


def peft(client: Any, folder: Path, at: str, alpha: float, weights: str) -> None:
    """A PEFT adapter of one layer under a prefix; the scale is in its configuration alone."""
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    draw = numpy.random.default_rng(0)
    tensors = {f"{name}.lora_A.weight": draw.random((2, 3072)), f"{name}.lora_B.weight": draw.random((3072, 2))}
    save_file({key: value.astype(numpy.float32) for key, value in tensors.items()}, folder / "w.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["to_q"]}
    client.put_object(Bucket="peft", Key=f"{at}/{weights}", Body=(folder / "w.safetensors").read_bytes())
    client.put_object(Bucket="peft", Key=f"{at}/adapter_config.json", Body=json.dumps(config).encode())


@pytest.mark.parametrize("how", ["behind the configuration", "before the configuration", "one by one"])
def test_configurations_beside_objects_decide(place: Place, client: Any, how: str) -> None:
    names = {"one": "001.safetensors", "two": "002.safetensors", "three": "003.safetensors"}
    if how == "behind the configuration":
        names = dict.fromkeys(names, "adapter_model.safetensors")
    client.create_bucket(Bucket="peft")
    for at, alpha in (("one", 2.0), ("two", 6.0), ("three", 2.0)):
        peft(client, place.folder, at, alpha, names[at])
    if how == "one by one":
        lines = [f"s3://peft/{at}/{name}" for at, name in names.items()]
        (place.folder / "list.txt").write_text("\n".join(lines))
        sources = ["--files-from", "list.txt"]
    else:
        sources = ["s3://peft/"]
    line = ["batch", *sources, "--to", "diffusers", "--family", "flux1", "--out-dir", "out", "--workers", "1"]
    place.run(*line)
    records = [json.loads(text) for text in (place.folder / "out/manifest.jsonl").read_text().splitlines()]
    outcomes = {record["source"].split("/")[3]: record["outcome"] for record in records}
    assert outcomes["two"] == "done" and sorted(outcomes.values()) == ["done", "done", "linked"]
    # Another configuration beside the same weights is noticed.
    peft(client, place.folder, "one", 4.0, names["one"])
    again = json.loads(place.run(*line, "--json").splitlines()[-1])
    assert again["unchanged"] >= 1 and again["done"] + again["linked"] >= 1, again
    again = json.loads(place.run(*line, "--json").splitlines()[-1])
    assert again["unchanged"] == 3, again
    for item in client.list_objects_v2(Bucket="peft")["Contents"]:
        client.delete_object(Bucket="peft", Key=item["Key"])
    client.delete_bucket(Bucket="peft")
