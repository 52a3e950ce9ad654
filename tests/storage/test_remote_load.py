"""Loads from local S3 and HTTP servers."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from itertools import pairwise

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import mtj_loader
from mtj_loader.errors import AdapterError, CheckpointError, StorageError, UsageError, VerifyError
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.loading.load_params import load_params
from mtj_loader.options import Source
from mtj_loader.storage import retry
from tests.support import neox
from tests.support.adapters import linear, write_adapter
from tests.support.command_line import run
from tests.support.object_server import Fault, serve
from tests.support.remote_load import FAST, FILES, FOLDER, digests, load

ONE, TWO = sorted(path.name for path in FOLDER.glob("*.safetensors"))
SLOW = 20_000  # bytes per second; a range takes a minute


@pytest.fixture(scope="module")
def local():
    """Digests of the parameters loaded from the folder."""
    return digests(load(FOLDER))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_POLICY", FAST)


def loader_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("mtj_loader")}


@pytest.fixture
def server():
    with serve({f"some/model/{name}": data for name, data in FILES.items()}) as running:
        before = loader_threads()
        yield running
        assert loader_threads() <= before
        end = time.monotonic() + 60
        while running.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert running.connections == 0


# ---- HTTP


@pytest.mark.parametrize("host_memory", ["64MiB", "1GiB"])
@pytest.mark.parametrize("transposed_linear", [False, True])
def test_http_equals_local(server, local, host_memory, transposed_linear):
    options = {"host_memory": host_memory, "transposed_linear": transposed_linear}
    model = load(f"{server.url}/some/model/", **options)
    wanted = digests(load(FOLDER, **options)) if transposed_linear else local
    assert digests(model) == wanted
    assert model.plan.checkpoint.location == f"{server.url}/some/model"
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("ROMEO.")) == "ROMEO."


def test_network_bytes_are_counted(server):
    model = load(f"{server.url}/some/model")
    weights = [r for r in server.requests if r.path.endswith(".safetensors") and r.start]
    asked_bytes = sum(request.stop - request.start for request in weights)
    assert model.report.bytes_read == asked_bytes
    assert model.report.bytes_needed <= asked_bytes <= 1.02 * model.report.bytes_needed
    spans = sorted((r.path, r.start, r.stop) for r in weights)
    for (path, _, stop), (following, start, _) in pairwise(spans):
        assert path != following or start >= stop  # no byte twice
    assert len(spans) <= 10


def test_opening_takes_few_round_trips(server):
    shards = [f"model-{i:05}-of-00048.safetensors" for i in range(1, 49)]
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    for i, shard in enumerate(shards):
        text = header.replace('"x"', f'"t{i}"').encode()
        data = len(text).to_bytes(8, "little") + text + b"\0"
        server.objects[f"many/{shard}"] = data
    index = {"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}
    server.objects["many/model.safetensors.index.json"] = json.dumps(index).encode()
    server.objects["many/config.json"] = b"{}"
    server.latency_seconds = 0.1
    checkpoint = open_checkpoint(Source(f"{server.url}/many"))
    assert len(checkpoint.index.records) == 48
    assert server.most_active >= 16


def test_a_tied_copy_at_a_url(server, tmp_path):
    embedding = np.random.default_rng(0).normal(size=(29_000, 24)).astype(np.float32)  # 2.8 MB
    arrays = neox.tensors() | {"gpt_neox.embed_in.weight": embedding, "embed_out.weight": embedding}
    folder = neox.write(tmp_path, arrays, tie_word_embeddings=True, vocab_size=len(embedding))
    server.objects |= {f"tied/{path.name}": path.read_bytes() for path in folder.iterdir()}
    assert digests(load(f"{server.url}/tied")) == digests(load(folder))
    assert len(server.gets("tied/model.safetensors")) == 4  # header, all, and both once more
    broken = bytearray(server.objects["tied/model.safetensors"])
    broken[-1] ^= 1  # of embed_out.weight
    server.objects["tied/model.safetensors"] = bytes(broken)
    with pytest.raises(VerifyError, match=f"at byte {embedding.nbytes - 1:,} of the tensor"):
        load(f"{server.url}/tied")


def test_one_file(server):
    checkpoint = open_checkpoint(Source(f"{server.url}/some/model/{ONE}"))
    assert [*checkpoint.index.files] == [ONE]
    assert checkpoint.location == f"{server.url}/some/model/{ONE}"
    assert any("is one of 2 files" in warning for warning in checkpoint.index.warnings)


def test_transient_faults(server, local):
    """Each fault is retried, and every byte is correct."""
    faults = [
        Fault(status=503),
        Fault(after_bytes=50_000, reset=True),
        Fault(status=429, headers={"Retry-After": "1"}),
        Fault(after_bytes=1000),
        Fault(after_bytes=70_000, stall=True),
    ]
    small = [Fault(status=503), Fault(after_bytes=100), Fault(after_bytes=0, stall=True)]
    server.faults = {"some/model/config.json": deque(small)}
    plan = mtj_loader.plan(f"{server.url}/some/model", "mp=2", host_memory="64MiB")
    server.faults |= {f"some/model/{name}": deque(faults) for name in (ONE, TWO)}
    assert digests(mtj_loader.load(plan=plan, progress=False)) == local
    assert {name: len(faults) for name, faults in server.faults.items() if faults} == {}


PERMANENT = {
    "500": (Fault(status=500), StorageError, "HTTP 500"),
    "403": (Fault(status=403), StorageError, "the server refuses access"),
    "404": (Fault(status=404), CheckpointError, "the file is missing"),
    "whole": (Fault(whole=True), StorageError, "does not support range requests"),
    "short": (Fault(after_bytes=100), StorageError, "the server keeps failing"),
    "stall": (Fault(after_bytes=100, stall=True), StorageError, "within the time limit"),
    "changed": (Fault(etag='"other"'), CheckpointError, "changed after its header was read"),
}


@pytest.mark.parametrize(("fault", "kind", "words"), PERMANENT.values(), ids=PERMANENT)
def test_faults_while_streaming(server, fault, kind, words):
    """One file fails permanently; the load does not wait for the other, which is very slow."""
    plan = mtj_loader.plan(f"{server.url}/some/model", "mp=2")
    server.always[f"some/model/{TWO}"] = fault
    server.rates[f"some/model/{ONE}"] = SLOW
    with pytest.raises(kind) as caught:
        mtj_loader.load(plan=plan, progress=False)
    assert server.bytes_sent[f"some/model/{ONE}"] < len(FILES[ONE]) // 2
    assert words in str(caught.value)
    assert f"some/model/{TWO}\n" in str(caught.value)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_object_replaced_around_the_load(server, moment):
    plan = mtj_loader.plan(f"{server.url}/some/model", "mp=2")
    last_bytes = 0 if moment == "before" else plan.host_bytes(0)

    def replace(done: int) -> None:
        if done >= last_bytes:
            server.objects[f"some/model/{ONE}"] = FILES[ONE][::-1]

    replace(0)
    with (
        plan.checkpoint.storage,
        pytest.raises(CheckpointError, match="changed after its header was read"),
    ):
        load_params(plan, mtj_loader.make_mesh("mp=2"), progress=replace)


def test_an_interrupted_load_cleans_up(server):
    """The server's fixture checks for threads and connections afterwards."""
    plan = mtj_loader.plan(f"{server.url}/some/model", "mp=2")
    server.rates = {f"some/model/{name}": SLOW for name in (ONE, TWO)}

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with plan.checkpoint.storage, pytest.raises(KeyboardInterrupt):
        load_params(plan, mtj_loader.make_mesh("mp=2"), progress=interrupt)
    assert server.bytes_sent.total() < plan.host_bytes(0) // 2


def test_adapter_at_a_url(server, tmp_path):
    module = "gpt_neox.layers.{}.mlp.dense_4h_to_h"  # A is split by its columns
    factors = [linear(module.format(i), 192, 768, rank=16) for i in range(3)]
    folder = write_adapter(tmp_path / "adapter", {**factors[0], **factors[1], **factors[2]}, r=16)
    server.objects |= {f"lora/{path.name}": path.read_bytes() for path in folder.iterdir()}
    model = load(f"{server.url}/some/model", adapter=f"{server.url}/lora")
    assert digests(model) == digests(load(FOLDER, adapter=folder))
    assert len(server.gets("lora/adapter_model.safetensors")) == 2  # header, and all factors
    assert model.report.bytes_read <= 1.02 * model.report.bytes_needed
    later = load(f"{server.url}/some/model").with_adapter(f"{server.url}/lora")
    assert digests(later) == digests(model)
    assert later.plan.adapters[0].location == f"{server.url}/lora"
    with pytest.raises(AdapterError, match="not the folder of an adapter"):
        load(f"{server.url}/some/model", adapter=f"{server.url}/nothing")


def test_without_config(server):
    del server.objects["some/model/config.json"]
    with pytest.raises(CheckpointError, match=r"there is no config\.json") as caught:
        open_checkpoint(Source(f"{server.url}/some/model"))
    assert f"file: {server.url}/some/model\n" in str(caught.value)


def test_revision_of_a_url():
    with pytest.raises(UsageError, match="only a Hugging Face id has revisions"):
        open_checkpoint(Source("s3://bucket/model", revision="main"))


def test_commands(server, tmp_path):
    def output(*arguments):
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    url = f"{server.url}/some/model"
    assert '"tensors"' in output("inspect", url, "--json")
    plan = json.loads(output("plan", url, "--mesh", "mp=2", "--json"))
    assert plan["location"] == url
    out = tmp_path / "converted"
    output("convert", url, "--dtype", "float32", "--out", out, "--no-progress")
    assert (out / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    text = output("load", url, "--mesh", "mp=2", "--verify", "--no-progress")
    assert "verified: all" in text


# ---- S3


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="models")
    for name, data in FILES.items():
        client.put_object(Bucket="models", Key=f"neox/small/{name}", Body=data)
    yield client, endpoint
    client.close()
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    client, endpoint = moto
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return client


def test_s3_equals_local(s3, local):
    model = load("s3://models/neox/small", host_memory="64MiB")
    assert digests(model) == local
    assert model.plan.checkpoint.location == "s3://models/neox/small"
    assert model.tokenizer is not None
    ratio = model.report.bytes_read / model.report.bytes_needed
    assert 1 <= ratio <= 1.02


def test_s3_lists(s3):
    with open_checkpoint(Source("s3://models/neox/small")).storage as storage:
        assert storage.names() == sorted(FILES)
    s3.put_object(Bucket="models", Key="neox/small/other.safetensors", Body=b"x")
    warnings = open_checkpoint(Source("s3://models/neox/small")).index.warnings
    s3.delete_object(Bucket="models", Key="neox/small/other.safetensors")
    assert any("not read: other.safetensors" in warning for warning in warnings)


def test_s3_object_replaced_between_header_and_read(s3):
    key = f"neox/small/{ONE}"
    plan = mtj_loader.plan("s3://models/neox/small", "mp=2")
    with plan.checkpoint.storage as storage:
        s3.put_object(Bucket="models", Key=key, Body=FILES[ONE][::-1])
        with pytest.raises(CheckpointError, match="changed after its header was read"):
            storage.read(ONE, 300_000, 100)
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        mtj_loader.load(plan=plan, progress=False)
    s3.put_object(Bucket="models", Key=key, Body=FILES[ONE])


def test_s3_missing_bucket(s3):
    with pytest.raises(CheckpointError, match="bucket or endpoint not found") as caught:
        open_checkpoint(Source("s3://no-such-bucket/model"))
    assert "file: s3://no-such-bucket/model\n" in str(caught.value)
    assert "HTTP 404: NoSuchBucket, The specified bucket does not exist" in str(caught.value)


def test_s3_missing_prefix(s3):
    with pytest.raises(CheckpointError, match=r"there is no config\.json") as caught:
        open_checkpoint(Source("s3://models/nothing/here"))
    assert "found: no files" in str(caught.value)
