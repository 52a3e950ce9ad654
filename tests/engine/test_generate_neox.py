"""Text of the fixture in float32, compared with transformers (tests/oracle/make_greedy.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mtj_loader.engine.generator import Generator
from mtj_loader.formats.token_ids import bos_id, eos_ids
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.generation.tokenizer import load_tokenizer
from mtj_loader.models.forward import Forward, Params
from mtj_loader.sampling.params import SamplingParams
from tests.support.engines import make_generator
from tests.support.models import DATA, config_of, make_forward, place
from tests.support.mtj_tree import neox_tree

FIXTURE = DATA / "shakespeare-neox"
CASES = json.loads((DATA / "shakespeare-greedy.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(max_new_tokens=100, temperature=0)
LOGITS_TOLERANCE = 1e-4  # between two implementations in float32


@pytest.fixture(scope="module")
def model() -> tuple[Forward, Params]:
    """On a mesh with both axes."""
    forward = make_forward(config_of(FIXTURE), dp=2, mp=4)
    tensors = {}
    for path in sorted(FIXTURE.glob("*.safetensors")):
        tensors |= load_file(path)
    tree = neox_tree(tensors, layers=6, shards=4, transposed_linear=False)
    return forward, place(tree, forward)


@pytest.fixture(scope="module")
def generator(model: tuple[Forward, Params]) -> Generator:
    configs = [
        json.loads((FIXTURE / name).read_text())
        for name in ("config.json", "generation_config.json")
    ]
    tokenizer = load_tokenizer({path.name: path for path in FIXTURE.iterdir()}, "gpt_neox")
    forward, params = model
    config = forward.config
    rules = PromptRules(config.vocab_size, config.max_positions, tokenizer, bos_id(*configs))
    return make_generator(forward, params, rules, eos_ids(*configs))


def test_no_oracle_step_is_nearly_tied():
    assert min(case["smallest_gap"] for case in CASES) > 50 * LOGITS_TOLERANCE
    assert len({len(case["prompt_ids"]) for case in CASES}) > 3


def test_greedy_ids_of_a_batch_equal_transformers(generator: Generator):
    prompts = [case["prompt_ids"] for case in CASES]
    assert generator.start(prompts, GREEDY).result() == [case["new_ids"] for case in CASES]


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case["prompt"])
def test_greedy_text_of_one_prompt_equals_transformers(generator: Generator, case: dict):
    assert generator.rules.tokenizer is not None
    expected = generator.rules.tokenizer.decode(case["new_ids"])
    assert generator.start(case["prompt"], GREEDY).result() == expected
    assert "".join(generator.start(case["prompt"], GREEDY).stream()) == expected  # pyright: ignore


def test_logits_equal_transformers(model: tuple[Forward, Params]):
    """At the end of the prompt and before the last new token, in one pass over both."""
    case = CASES[-1]
    ids = [*case["prompt_ids"], *case["new_ids"][:-1]]
    forward, params = model
    logits = forward.logits(params, [ids])[0]
    for position, name in ((len(case["prompt_ids"]) - 1, "first_logits"), (-1, "last_logits")):
        found = np.asarray(logits)[position, case["logit_ids"]]
        np.testing.assert_allclose(found, case[name], rtol=0, atol=LOGITS_TOLERANCE)


def test_sampled_text_does_not_depend_on_the_batch(generator: Generator):
    prompts = [case["prompt"] for case in CASES]
    params = SamplingParams(max_new_tokens=100, temperature=0.9, top_k=60, top_p=0.9, seed=3)
    together = generator.start(prompts, params).result()
    alone = [generator.start(prompt, params).result() for prompt in prompts[:2]]
    assert together[:2] == alone
    assert len(set(together)) == len(CASES)
