"""The public interface of `Model`, as a user calls it."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import mtj_loader
from mtj_loader.errors import PromptError, TokenizerMissingError
from mtj_loader.generation.prompts import read_prompts
from tests.support import neox

FIXTURE = Path(__file__).parent / "data/shakespeare-neox"


@pytest.fixture(scope="module")
def model() -> mtj_loader.Model:
    return mtj_loader.load(FIXTURE, "dp=2,mp=4")


def test_everything_in_the_readme_is_there(model: mtj_loader.Model) -> None:
    assert model.config.vocab_size == 3003
    assert model.mesh.shape == {"dp": 2, "mp": 4}
    assert model.tokenizer is not None
    assert model.report.bytes_read == 7645440
    for name in mtj_loader.__all__:
        assert getattr(mtj_loader, name) is not None


def test_logits_of_a_batch_that_dp_does_not_divide(model: mtj_loader.Model) -> None:
    ids = np.arange(21).reshape(3, 7)
    logits = model.logits(ids)
    assert (logits.shape, logits.dtype) == ((3, 7, 3003), jnp.float32)
    np.testing.assert_allclose(logits[2:], model.logits(ids[2:]), atol=0.05)  # bfloat16


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[0, 3003]], r"ids\[0\]\[1\](.|\n)*3003|3003"),
        ([[-1]], "-1"),
        ([1, 2], "batch"),
        ([[0.5]], "batch"),
        (np.zeros((1, 513), int), "513"),
    ],
)
def test_invalid_ids_are_rejected(model: mtj_loader.Model, ids, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        model.logits(ids)


def test_text_for_text_ids_for_ids_a_list_for_a_list(model: mtj_loader.Model) -> None:
    assert model.tokenizer is not None
    greedy = {"max_new_tokens": 6, "temperature": 0.0}
    prompts = ["ROMEO.\n", model.tokenizer.encode("Enter HAMLET")]
    text, ids = model.generate(prompts, **greedy)
    assert isinstance(text, str)
    assert isinstance(ids, list)
    assert model.generate(prompts[0], **greedy) == text
    assert model.generate(prompts[1], **greedy) == ids
    assert "".join(model.stream(prompts[0], **greedy)) == text


def test_threads_may_generate_at_the_same_time(model: mtj_loader.Model) -> None:
    """On several devices: collectives of two programs must not wait for each other."""

    def run(_: int) -> tuple[object, float]:
        text = model.generate("ROMEO.\n", max_new_tokens=4, temperature=0.0)
        return text, float(model.logits([[1, 2]])[0, 0, 0])

    with ThreadPoolExecutor(20) as threads:
        assert len(set(threads.map(run, range(20)))) == 1


def test_without_a_tokenizer_ids_still_work(tmp_path: Path) -> None:
    model = mtj_loader.load(neox.write(tmp_path), "mp=2")
    assert model.tokenizer is None
    found = model.generate([1, 2, 3], max_new_tokens=4, temperature=0.0)
    assert len(found) == 4
    with pytest.raises(TokenizerMissingError, match="no tokenizer"):
        model.generate("text")


@pytest.mark.parametrize(("name", "known"), [("CohereTokenizer", False), ("BloomTokenizer", True)])
def test_tokenizer_json_of_an_unknown_class_gives_a_warning(tmp_path: Path, name, known) -> None:
    folder = neox.write(tmp_path, tokenizer_class=name)
    shutil.copy(FIXTURE / "tokenizer.json", folder)
    report = mtj_loader.load(folder, "mp=2").report
    assert any(name in one and "may differ" in one for one in report.warnings) is not known


def test_a_tokenizer_of_an_unknown_class_leaves_the_weights_usable(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, tokenizer_class="RobertaTokenizer")
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("")
    model = mtj_loader.load(folder, "mp=2")
    assert model.tokenizer is None
    assert any("only token ids work" in one and "Roberta" in one for one in model.report.warnings)
    for text, stop in (("a", None), ([1], "a")):
        with pytest.raises(TokenizerMissingError, match="RobertaTokenizer"):
            model.generate(text, stop=stop, max_new_tokens=1)
    with pytest.raises(TokenizerMissingError, match=r"RobertaTokenizer, vocab\.json, merges\.txt"):
        mtj_loader.load(folder, "mp=2", warm_up=lambda rules: read_prompts("a", rules, 1))


def test_the_state_is_that_of_mesh_transformer_jax(model: mtj_loader.Model) -> None:
    state = model.state(optimizer=optax.scale(0.0))
    assert set(state) == {"params", "step", "opt_state"}
    assert state["params"] is model.params
    np.testing.assert_array_equal(state["step"], np.zeros(4, np.uint32))
    assert state["step"].dtype == np.uint32
    assert jax.tree.structure(state["opt_state"]) == jax.tree.structure(
        optax.scale(0.0).init(model.params)
    )


def test_an_optimizer_is_initialized_on_each_shard(model: mtj_loader.Model) -> None:
    state = model.state(optimizer=optax.adam(1e-3))
    moments = state["opt_state"][0]
    assert moments.count.shape == (4,)
    jax.tree.map(
        lambda moment, param: moment.shape == param.shape or pytest.fail("shapes differ"),
        moments.mu,
        model.params,
    )
    for leaf in jax.tree.leaves(state["opt_state"]):
        assert leaf.sharding.spec == PartitionSpec("mp")
        assert not np.asarray(leaf).any()
    at = "causal_transformer_shard/~/layer_0/~/linear_4"
    param, moment = model.params[at]["w"], moments.mu[at]["w"]
    assert {s.device: s.index for s in param.addressable_shards} == {
        s.device: s.index for s in moment.addressable_shards
    }


def test_a_model_without_its_generation_config_still_stops(tmp_path: Path) -> None:
    """The end-of-text token then comes from config.json."""
    folder = tmp_path / "model"
    shutil.copytree(FIXTURE, folder)
    (folder / "generation_config.json").unlink()
    prompt = "THE END"
    one, other = (
        mtj_loader.load(path, "mp=2").generate(prompt, max_new_tokens=8, temperature=0.0)
        for path in (FIXTURE, folder)
    )
    assert one == other
