"""`repr` of public objects: short for models of any size, and without credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.options import LoadOptions, Source
from mtj_loader.storage.hub import Repository
from tests.loading.test_real_shapes import write_sparse
from tests.models.test_decoder_configs import LLAMA_3_1_8B
from tests.planning.test_published_sizes import llama_shapes

FIXTURE = Path(__file__).parent / "data/shakespeare-neox"


def check(shown: object, *words: str) -> None:
    """A representation of at most three lines that has all of `words`."""
    text = repr(shown)
    assert len(text) <= 400, text
    assert text.count("\n") <= 2
    for word in words:
        assert word in text, text


def test_a_loaded_model() -> None:
    model = mtj_loader.load(FIXTURE, "dp=2,mp=4")
    check(model, "Model gpt_neox from", str(FIXTURE), "dp=2, mp=4", "76 arrays", "1.92 MB", "cpu")
    check(model.report, "LoadReport: 76 parameters, 7.65 MB read in ")
    check(model.plan, "LoadPlan of gpt_neox from", "dp=2, mp=4: 76 arrays, 1.92 MB on each device")
    check(model.tokenizer, "Tokenizer with 3,003 tokens")
    check(model._generator, "Generator", "3,003 tokens")
    check(model.plan.checkpoint, "Checkpoint", str(FIXTURE), "76 tensors in 2 files")
    check(model.plan.weight_map, "WeightMap", "gpt_neox.json")
    check(model.mesh)


def test_a_plan_of_a_large_model_for_many_hosts(tmp_path: Path) -> None:
    folder = write_sparse(tmp_path / "model", llama_shapes(LLAMA_3_1_8B), LLAMA_3_1_8B)
    pod = mtj_loader.make_abstract_mesh("dp=32,mp=8", 64)
    plan = mtj_loader.plan(folder, pod)
    check(plan, "LoadPlan of llama from", "dp=32, mp=8: 291 arrays, 2.01 GB on each device")
    check(plan.topology, "Topology dp=32, mp=8 on 64 hosts")
    query = next(param for param in plan.params if "layer_7/~/linear" in param.spec.path)
    check(query, "ParamPlan layer_7/~/linear", "bfloat16 from model.layers.7.")


def test_a_conversion(tmp_path: Path) -> None:
    report = mtj_loader.convert(FIXTURE, tmp_path / "out", dtype="bfloat16")
    check(report, "ConvertReport: 76 tensors to bfloat16", "1 file in", "0 became zero")


def test_options_are_shown_where_they_differ_from_the_defaults() -> None:
    assert repr(LoadOptions()) == "LoadOptions()"
    options = LoadOptions(dtype="float32", check_finite=True)
    assert repr(options) == "LoadOptions(dtype='float32', check_finite=True)"
    assert repr(Source("org/name", revision="v1")) == "Source(path='org/name', revision='v1')"
    assert repr(Source("a?b@c")) == "Source(path='a?b@c')"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (Source("org/name", token="hf_secret"), "Source(path='org/name')"),
        (Repository("org/name", "hf_secret"), "Repository(id='org/name', "),
        (Source("https://me:hf_secret@host/x"), "Source(path='https://host/x')"),
        (Source("https://host/x?sig=hf_secret"), "Source(path='https://host/x')"),
        (Source("abfs://box@account/x"), "Source(path='abfs://box@account/x')"),
        (
            LoadOptions(adapter=[("https://host/a?sig=hf_secret", 0.5), ("b", 1.0)]),
            "LoadOptions(adapter=[('https://host/a', 0.5), ('b', 1.0)])",
        ),
    ],
)
def test_credentials_are_not_shown(shown: object, expected: str) -> None:
    assert repr(shown).startswith(expected)
    assert "hf_secret" not in repr(shown)
