"""Generation with fake models: batches, stop conditions, streams, shapes."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from mtj_loader.engine.generate_options import TextOptions
from mtj_loader.engine.generator import Generator
from mtj_loader.errors import NonFiniteError, PromptError, TokenizerMissingError, UsageError
from mtj_loader.generation.prompts import Prompt, PromptRules
from mtj_loader.generation.row_output import Completion
from mtj_loader.sampling.params import SamplingParams
from tests.support.engines import make_generator
from tests.support.fake_forward import (
    FakeConfig,
    HashForward,
    ScriptForward,
    hash_tokens,
    make_mesh,
)
from tests.support.fixture_tokenizer import TOKENIZER
from tests.support.recorded_programs import RecordedPrograms

VOCAB = 3003
END = 0  # the fixture's end of text
TABLE = np.random.default_rng(5).normal(size=(101, VOCAB)).astype(np.float32)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
MODEL_RULES = PromptRules(VOCAB, FakeConfig(VOCAB).max_positions, TOKENIZER)


def hashing(dp: int = 1, table: np.ndarray = TABLE, **fields) -> Generator:
    forward = HashForward(FakeConfig(VOCAB), make_mesh(dp))
    programs = PROGRAMS.setdefault((dp, id(table)), RecordedPrograms(forward, forward.place(table)))
    programs.started.clear()
    made = make_generator(forward, forward.place(table), MODEL_RULES, programs=programs)
    return replace(made, **fields)


PROGRAMS: dict = {}  # compiled once


def saying(*scripts: list[int] | str, **fields) -> Generator:
    """A model that generates these texts, and then only end-of-text tokens."""
    ids = [TOKENIZER.encode(s) if isinstance(s, str) else s for s in scripts]
    script = np.zeros((len(ids), 40), np.int32)
    for row, tokens in zip(script, ids, strict=True):
        row[: len(tokens)] = tokens
    forward = ScriptForward(FakeConfig(VOCAB))
    params = forward.place(script)
    programs = PROGRAMS.setdefault(script.shape, RecordedPrograms(forward, params))
    programs.started.clear()
    made = make_generator(forward, params, MODEL_RULES, frozenset({END}), programs=programs)
    return replace(made, **fields)


def generate(generator: Generator, prompts, params=GREEDY, stop=None, **options):
    return generator.start(prompts, params, TextOptions(stop), **options).result()


def stream(generator: Generator, prompt, params=GREEDY, stop=None):
    return generator.start(prompt, params, TextOptions(stop), streamed=True).stream()


def completions(generator: Generator, prompts, params=GREEDY, stop=None) -> list[Completion]:
    return generator.start(prompts, params, TextOptions(stop)).complete()


# Batches


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_prompts_of_unequal_length_give_what_each_gives_alone(dp: int):
    prompts = [[5], [7, 8, 9] * 11, [1, 2], [3000] * 16, [4, 4, 4]]
    expected = [hash_tokens(TABLE, prompt, 12) for prompt in prompts]
    assert generate(hashing(dp), prompts, GREEDY) == expected
    assert [generate(hashing(dp), prompt, GREEDY) for prompt in prompts] == expected


def test_sampled_rows_give_what_each_gives_alone():
    prompts, seeds = ["Romeo", [7, 8, 9] * 11, "O", "O"], [1, 2, 3, 4]
    params = SamplingParams(max_new_tokens=12, temperature=1.5, top_k=900, top_p=0.95)
    together = generate(hashing(), prompts, params, seeds=seeds)
    for prompt, seed, continued in zip(prompts, seeds, together, strict=True):
        assert generate(hashing(), prompt, replace(params, seed=seed)) == continued
    assert together[2] != together[3]
    assert generate(hashing(), ["O", "O", "O", "O"], replace(params, seed=3)) == [together[2]] * 4


def test_every_token_is_drawn_independently():
    uniform = hashing(table=np.zeros_like(TABLE))
    ids = generate(uniform, [5], SamplingParams(max_new_tokens=12, temperature=1))
    assert len(set(ids)) == 12


def test_the_result_has_the_form_of_the_prompt():
    generator, ids = hashing(), TOKENIZER.encode("To be")
    expected = hash_tokens(TABLE, ids, 12)
    text = TOKENIZER.decode(expected)
    assert generate(generator, "To be", GREEDY) == text
    assert generate(generator, ids, GREEDY) == expected
    assert generate(generator, tuple(ids), GREEDY) == expected
    assert generate(generator, np.array(ids), GREEDY) == expected
    assert generate(generator, jax.numpy.array(ids), GREEDY) == expected
    assert generate(generator, ["To be"], GREEDY) == [text]
    assert generate(generator, [ids], GREEDY) == [expected]
    assert generate(generator, np.array([ids, ids]), GREEDY) == [expected, expected]
    mixed = ["To be", ids, np.array(ids), tuple(ids)]
    assert generate(generator, mixed, GREEDY) == [text, expected, expected, expected]


def test_without_a_tokenizer_ids_still_work():
    generator = hashing(rules=replace(MODEL_RULES, tokenizer=None))
    assert generate(generator, [5], GREEDY) == hash_tokens(TABLE, [5], 12)
    assert completions(generator, [5])[0].text is None
    with pytest.raises(TokenizerMissingError, match=r"(?s)has no tokenizer.*prompts\[1\].*ids"):
        generate(generator, [[5], "To be"], GREEDY)
    with pytest.raises(TokenizerMissingError, match="stop strings need a tokenizer"):
        generate(generator, [5], GREEDY, stop="x")


# Stop conditions


def test_the_end_of_text_token_is_not_part_of_the_text():
    hello = TOKENIZER.encode(" hello there")
    found = completions(saying(" hello there", [END], " O"), [[1], [2, 2], [3, 3, 3]])
    assert found == [
        Completion(" hello there", tuple(hello), "stop", prompt_tokens=1),
        Completion("", (), "stop", prompt_tokens=2),
        Completion(" O", tuple(TOKENIZER.encode(" O")), "stop", prompt_tokens=3),
    ]


def test_max_new_tokens_ends_a_row():
    (found,) = completions(saying(" hello there"), "x", replace(GREEDY, max_new_tokens=1))
    first = TOKENIZER.encode(" hello there")[0]
    assert found == Completion(TOKENIZER.decode([first]), (first,), "length", prompt_tokens=1)


def test_a_model_without_end_of_text_continues_to_max_new_tokens():
    (found,) = completions(saying(" O", eos_ids=frozenset()), "x")
    assert found.ids == (*TOKENIZER.encode(" O"), *[END] * 11)
    assert (found.text, found.finish_reason) == (" O", "length")


@pytest.mark.parametrize(
    ("stop", "text", "whole_tokens"),
    [  # S|to|p| here|!| Or| not
        ("!", "Stop here", 4),
        ("re!", "Stop he", 3),
        (["zz", "p h"], "Sto", 2),
        ("op", "St", 1),
        ("Stop", "", 0),
        ("no such thing", "Stop here! Or not", 7),
        (None, "Stop here! Or not", 7),
    ],
)
def test_stop_strings(stop, text: str, whole_tokens: int):
    generator, ids = saying("Stop here! Or not"), TOKENIZER.encode("Stop here! Or not")
    (found,) = completions(generator, "x", stop=stop)
    assert found == Completion(text, tuple(ids[:whole_tokens]), "stop", prompt_tokens=1)
    assert sum(stream(generator, [3], GREEDY, stop), []) == ids[:whole_tokens]  # noqa: RUF017


def test_a_stop_string_at_the_last_token_still_counts():
    count = len(TOKENIZER.encode("Stop here!"))
    params = replace(GREEDY, max_new_tokens=count)
    assert completions(saying("Stop here! Or"), "x", params, "!")[0].finish_reason == "stop"
    (found,) = completions(saying("Stop here! Or"), "x", params, "!!")
    assert (found.text, found.finish_reason) == ("Stop here!", "length")


def steps_run(generator: Generator, prompts, params: SamplingParams) -> int:
    completions(generator, prompts, params)
    while not generator.engine.idle:
        pass
    return generator.engine._programs.count("step")  # pyright: ignore


def test_the_device_is_at_most_one_step_ahead():
    params = replace(GREEDY, max_new_tokens=30)
    said = len(TOKENIZER.encode(" hello there"))
    # One step for the end-of-text token, and one ahead.
    assert steps_run(saying(" hello there", " O"), ["x", "y"], params) == said + 1
    assert steps_run(saying([END]), "x", params) <= 1
    assert steps_run(hashing(), "x", params) == 29  # the first token comes from the prompt
    assert steps_run(hashing(), "x", replace(GREEDY, max_new_tokens=1)) == 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(temperature: float):
    params = replace(GREEDY, temperature=temperature)
    parts = saying([5, -1]).start([Prompt((3,), False)], params).pieces
    assert next(parts).ids == (5,)
    with pytest.raises(NonFiniteError, match=r"(?s)NaN or infinite.*float32"):
        next(parts)
    assert generate(saying([5, END, -1]), [3], params) == [5]  # tokens after the end are ignored


# Streams


@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_of_a_stream_add_up_to_the_result(seed: int):
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=seed)
    text = list(stream(hashing(), "To be", params, stop="ee"))
    assert all(text)
    assert "".join(text) == generate(hashing(), "To be", params, stop="ee")
    ids = list(stream(hashing(), [5, 6], params, stop="ee"))
    assert all(ids)
    assert sum(ids, []) == generate(hashing(), [5, 6], params, stop="ee")  # noqa: RUF017


def test_a_possible_stop_string_is_held_back():
    generator = saying("One.\nTwo.\n\nThree")
    parts = list(stream(generator, "x", GREEDY, stop="\n\n"))
    assert "".join(parts) == "One.\nTwo."
    assert "\nT" in parts[2] or "\n" not in parts[1]
    assert not any(part.endswith("\n") for part in parts)


def test_characters_are_streamed_whole():
    generator = saying("a😀你", eos_ids=frozenset({END}))
    assert list(stream(generator, "x", GREEDY)) == ["a", "😀", "你"]
    assert list(stream(generator, [3], GREEDY)) == [
        TOKENIZER.encode(character) for character in "a😀你"
    ]
    cut = replace(GREEDY, max_new_tokens=3)
    assert list(stream(generator, "x", cut)) == ["a", "\ufffd"]
    assert sum(stream(generator, [3], cut), []) == TOKENIZER.encode("a😀")[:3]  # noqa: RUF017


def test_pieces_of_several_rows_are_interleaved():
    parts = list(saying(" O", " hello there").start([Prompt((1,), True)] * 2, GREEDY).pieces)
    assert [part.row for part in parts] == [0, 1, 0, *[1] * (len(parts) - 3)]
    ends = {part.row: part.finish_reason for part in parts if part.finish_reason}
    assert ends == {0: "stop", 1: "stop"}


def test_a_stream_may_be_closed_early():
    generator = hashing()
    parts = stream(generator, "x", SamplingParams(max_new_tokens=400))
    next(parts)
    parts.close()  # pyright: ignore
    assert list(parts) == []
    while not generator.engine.idle:
        pass
    assert generator.engine._programs.count("step") < 100  # pyright: ignore


def test_invalid_arguments_are_reported_before_the_first_piece():
    with pytest.raises(UsageError, match=r"(?s)only one prompt can be streamed.*a list of 2"):
        stream(hashing(), ["x", "y"], GREEDY)  # pyright: ignore
    with pytest.raises(UsageError, match="not a string for stop"):
        stream(hashing(), "x", GREEDY, stop="")
    with pytest.raises(UsageError, match="differ in length"):
        generate(hashing(), "x", seeds=[1, 2])
    with pytest.raises(PromptError):
        stream(hashing(), [], GREEDY)
    with pytest.raises(UsageError, match="0 only with prompt_logprobs"):
        stream(hashing(), [5], replace(GREEDY, max_new_tokens=0))
