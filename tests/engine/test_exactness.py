"""A request gives the same text alone and in any company, for every family."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import pytest

import mtj_loader
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.generator import Generator
from mtj_loader.engine.keys import INIT, choose_key, prefill_key, round_key, step_key
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import NonFiniteError
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.sampling.params import SamplingParams
from tests.parity.cases import CASES
from tests.support.engines import make_generator
from tests.support.models import DATA, PARITY

SIZES = Sizes(groups=1, slots=2, context=32)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=3)
PROMPT = [(5 * i + 1) % 29 for i in range(18)]  # one chunk, and two tokens
NEIGHBORS = [[4, 4, 9], [2] * 17]
FOLDERS = {name: DATA / "families" / name / next(iter(cases)) for name, cases in CASES.items()}
FOLDERS |= {"gpt_neox": next(path.parent for path in sorted(PARITY.glob("*/config.json")))}
FOLDERS |= {"llama, dynamic": DATA / "families" / "llama" / "dynamic"}


@dataclass(frozen=True)
class Loaded:
    """A model, and programs that new engines share."""

    model: mtj_loader.Model
    programs: Programs

    def generator(self, params: object = None) -> Generator:
        rules = PromptRules(self.model.config.vocab_size, SIZES.context)
        params = self.model.params if params is None else params
        return make_generator(
            self.model.forward,
            params,
            rules,
            slots=SIZES.slots,
            start=SIZES,
            programs=self.programs,
            threaded=False,
        )


def load(name: str) -> Loaded:
    """With the programs of both widths for single steps, and one for rounds of several."""
    model = mtj_loader.load(FOLDERS[name], "mp=1", dtype="float32")
    programs = Programs(model.forward, model.params)
    steps = [make(width) for width in SIZES.widths for make in (step_key, choose_key)]
    for key in (INIT, prefill_key(SIZES.chunks[0]), *steps, round_key(SIZES.slots)):
        programs.get(SIZES, key)
    return Loaded(model, programs)


def drawing(generator: Generator, prompt: list[int], seed: int = 3, *, streamed: bool = False):
    return generator.start(prompt, replace(SAMPLED, seed=seed), streamed=streamed)


@pytest.mark.parametrize("name", FOLDERS)
def test_seeded_text_does_not_depend_on_anything_else(name: str):
    loaded = load(name)
    expected = drawing(loaded.generator(), PROMPT).result()
    assert len(set(expected)) > 3
    found = {
        "streamed": streamed(loaded),
        "in a list": in_a_list(loaded),
        "with a streamed neighbor": beside_a_stream(loaded),
        "after a neighbor was cancelled": after_a_cancelled_neighbor(loaded),
        "with a kept prefix": with_a_kept_prefix(loaded),
        "with a kept prompt": with_a_kept_prompt(loaded),
    }
    assert found == dict.fromkeys(found, expected)


def streamed(loaded: Loaded) -> object:
    return sum(drawing(loaded.generator(), PROMPT, streamed=True).stream(), [])  # noqa: RUF017


def in_a_list(loaded: Loaded) -> object:
    """The neighbor ends before, and another one takes its slot."""
    prompts = [NEIGHBORS[0], PROMPT, NEIGHBORS[1]]
    return loaded.generator().start(prompts, SAMPLED, seeds=[8, 3, 9]).result()[1]


def beside_a_stream(loaded: Loaded) -> object:
    generator = loaded.generator()
    pieces = drawing(generator, NEIGHBORS[0], 8, streamed=True).stream()
    next(pieces)
    return drawing(generator, PROMPT).result()


def after_a_cancelled_neighbor(loaded: Loaded) -> list[int]:
    generator = loaded.generator()
    neighbor = drawing(generator, NEIGHBORS[1], 8).pieces
    next(neighbor)
    pieces = drawing(generator, PROMPT).pieces
    ids = list(next(pieces).ids)
    neighbor.close()  # pyright: ignore[reportAttributeAccessIssue]
    return ids + [token for piece in pieces for token in piece.ids]


def with_a_kept_prefix(loaded: Loaded) -> object:
    generator = loaded.generator()
    drawing(generator, PROMPT[:17], 8).result()
    drawing(generator, NEIGHBORS[0], 8).result()
    return drawing(generator, PROMPT).result()


def with_a_kept_prompt(loaded: Loaded) -> object:
    generator = loaded.generator()
    drawing(generator, PROMPT).result()
    return drawing(generator, PROMPT).result()


def test_what_a_request_with_nan_leaves_in_its_slot_harms_nobody():
    loaded = load("llama")
    expected = drawing(loaded.generator(), PROMPT).result()
    unused = next(token for token in range(2, 31) if token not in [*PROMPT, *expected])
    module = "causal_transformer_shard/~/embedding_shard/~/linear"
    table = jnp.asarray(loaded.model.params[module]["w"])
    damaged = loaded.model.params | {module: {"w": table.at[:, unused].set(jnp.nan)}}
    generator = loaded.generator(damaged)
    for first in range(SIZES.slots):  # no common beginning, so each gets a slot of its own
        with pytest.raises(NonFiniteError):
            drawing(generator, [first] + [unused] * 18).result()
    assert drawing(generator, PROMPT).result() == expected
