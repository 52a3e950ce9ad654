"""The engine with a model whose tokens a test can predict: any company, errors, limits, threads."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest

from mtj_loader.engine.generate_options import TextOptions
from mtj_loader.engine.generator import Generator
from mtj_loader.engine.keys import all_keys
from mtj_loader.engine.request import RunningRequest
from mtj_loader.engine.runner import Engine
from mtj_loader.engine.scheduler import TokenSequence
from mtj_loader.engine.sizes import ROUND_STEPS, Sizes
from mtj_loader.errors import (
    GenerationError,
    MemoryLimitError,
    NonFiniteError,
    QueueFullError,
)
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.generation.row_output import RowOutput, StopConditions, TextPiece
from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.row_settings import row_settings
from tests.support.engines import make_generator
from tests.support.fake_forward import STATES, FakeConfig, HashForward, hash_logits, hash_tokens
from tests.support.recorded_programs import RecordedPrograms

VOCAB = 64
NAN = VOCAB - 1  # after this token logits are NaN
TABLE = np.random.default_rng(5).normal(size=(STATES, VOCAB)).astype(np.float32)
TABLE[:, NAN] = -10
FORWARD = HashForward(FakeConfig(VOCAB, max_positions=256), nan_token=NAN)
PARAMS = FORWARD.place(TABLE)
SIZES = Sizes(groups=1, slots=4, context=256)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PROMPTS = [[5, 6, 7], [8] * 40, [1, 2], [3] * 17, [4, 9], [10]]


class Letters:
    """A tokenizer with one character for each token."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 97 for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(97 + token) for token in ids)

    def is_skipped(self, token: int) -> bool:
        return False

    is_byte = is_skipped


RULES = PromptRules(VOCAB, 256, Letters())  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def compiled() -> RecordedPrograms:
    """All programs of an engine, compiled."""
    programs = RecordedPrograms(FORWARD, PARAMS)
    for key in all_keys(SIZES):
        programs.get(SIZES, key)
    return programs


@pytest.fixture
def programs(compiled: RecordedPrograms) -> Iterator[RecordedPrograms]:
    compiled.started.clear()
    compiled.traced.clear()
    yield compiled
    compiled.replace = lambda _, program: program


@pytest.fixture
def generator(programs: RecordedPrograms) -> Generator:
    return making(programs)


def making(programs: RecordedPrograms, *, threaded: bool = False, **fields) -> Generator:
    """A generator on a new engine, which works when a test lets it."""
    defaults = {"slots": 4, "start": SIZES, "programs": programs, "threaded": threaded}
    return make_generator(FORWARD, PARAMS, RULES, **defaults | fields)


def starting(generator: Generator, prompt, params=GREEDY, *, streamed: bool = False, **options):
    return generator.start(prompt, params, TextOptions(**options), streamed=streamed)


@dataclass
class Heard:
    """A request, and what its listener was told."""

    request: RunningRequest
    events: list[TextPiece | BaseException]

    @property
    def ids(self) -> list[int]:
        assert not self.errors, self.errors
        return [
            token for piece in self.events if isinstance(piece, TextPiece) for token in piece.ids
        ]

    @property
    def errors(self) -> list[BaseException]:
        return [event for event in self.events if isinstance(event, BaseException)]


def hear(engine: Engine, prompt: list[int], params=GREEDY, **fields) -> Heard:
    """Starts a request."""
    sequence = TokenSequence(prompt, params.max_new_tokens, context_key=(), **fields)
    settings = row_settings(params, vocab_size=VOCAB, eos_ids=[])
    events: list[TextPiece | BaseException] = []
    output = RowOutput(0, None, StopConditions(params.max_new_tokens))
    request = RunningRequest(sequence, settings, (), VOCAB, output, events.append)
    engine.submit([request])
    return Heard(request, events)


def finish(engine: Engine) -> None:
    for _ in range(5_000):
        if not engine.advance():
            break
    assert_free(engine)


def assert_free(engine: Engine) -> None:
    """Nothing is left of the requests."""
    assert engine.idle
    assert not engine._started
    assert not engine._scheduler.running
    assert all(slot.sequence is None for slot in engine._scheduler.slots)


def alone(prompt: list[int], params=GREEDY) -> list[int]:
    return hash_tokens(TABLE, prompt, params.max_new_tokens)


# Company


@pytest.mark.parametrize("streamed", [False, True])
def test_requests_that_come_at_any_time_give_what_each_gives_alone(
    generator: Generator, streamed: bool
):
    engine, heard = generator.engine, []
    for prompt in PROMPTS * 3:
        heard.append(hear(engine, prompt, streamed=streamed))
        engine.advance()
    finish(engine)
    assert [each.ids for each in heard] == [alone(prompt) for prompt in PROMPTS * 3]


def test_stories_are_continued_from_what_slots_hold(generator: Generator):
    stories = [list(prompt) for prompt in PROMPTS]
    for _ in range(3):
        heard = [hear(generator.engine, story) for story in stories]
        finish(generator.engine)
        for story, each in zip(stories, heard, strict=True):
            assert each.ids == alone(story)
            story += [*each.ids[:9], 11]


def test_an_engine_grows_with_its_requests(programs: RecordedPrograms):
    engine = making(programs, start=Sizes(1, 1, 1)).engine
    first = hear(engine, [5, 6], replace(GREEDY, max_new_tokens=30))
    for _ in range(4):
        engine.advance()
    assert engine.sizes == Sizes(1, 1, 256)
    others = [hear(engine, prompt) for prompt in PROMPTS]
    finish(engine)
    assert engine.sizes == SIZES
    assert first.ids == hash_tokens(TABLE, [5, 6], 30)
    assert [each.ids for each in others] == [alone(prompt) for prompt in PROMPTS]


def test_a_row_may_reach_the_end_of_its_slot_within_a_round(generator: Generator):
    engine = generator.engine
    params = replace(GREEDY, max_new_tokens=11)
    heard = [
        hear(engine, [7] * 245, params),
        hear(engine, [5, 6], replace(params, max_new_tokens=40)),
    ]
    finish(engine)
    assert heard[0].ids == alone([7] * 245, params)
    assert heard[1].ids == hash_tokens(TABLE, [5, 6], 40)
    again = hear(engine, [9, 9])
    finish(engine)
    assert again.ids == alone([9, 9])


# Cancellation


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_is_cancelled_at_any_moment(programs: RecordedPrograms, streamed: bool):
    for moment in range(0, 26, 1 + streamed):
        engine = making(programs).engine
        heard = [hear(engine, prompt, streamed=streamed) for prompt in PROMPTS]
        for _ in range(moment):
            engine.advance()
        known = []
        for each in (heard[1], heard[-1]):  # a long prompt, and one that waits for a slot
            each.request.cancelled = True
            known.append(list(each.events))
        finish(engine)
        assert [heard[1].events, heard[-1].events] == known
        for each, prompt in zip(heard, PROMPTS, strict=True):
            expected = alone(prompt)
            assert each.ids == expected[: len(each.ids)]
            assert len(each.ids) == 12 or each in (heard[1], heard[-1])
        after = hear(engine, PROMPTS[1])
        finish(engine)
        assert after.ids == alone(PROMPTS[1])


def test_a_cancelled_request_costs_at_most_a_round(programs: RecordedPrograms):
    engine = making(programs).engine
    heard = hear(engine, [5, 6], replace(GREEDY, max_new_tokens=200))
    for _ in range(5):
        engine.advance()
    before = len(programs.started)
    heard.request.cancelled = True
    finish(engine)
    assert len(programs.started) == before


def test_a_stream_that_is_closed_early_ends_its_request(programs: RecordedPrograms):
    generator = making(programs)
    pieces = starting(
        generator, [5, 6], replace(GREEDY, max_new_tokens=200), streamed=True
    ).stream()
    first = [next(pieces) for _ in range(3)]
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    finish(generator.engine)
    assert sum(first, []) == hash_tokens(TABLE, [5, 6], 3)  # noqa: RUF017
    assert programs.count("step") < 6


def test_a_stream_that_is_dropped_ends_its_request(programs: RecordedPrograms):
    generator = making(programs)
    pieces = starting(
        generator, [5, 6], replace(GREEDY, max_new_tokens=200), streamed=True
    ).stream()
    next(pieces)
    del pieces
    finish(generator.engine)
    assert programs.count("step") < 6


def test_one_of_several_rows_may_be_closed_before_the_first_piece(generator: Generator):
    made = starting(generator, PROMPTS)
    made.pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert_free(generator.engine)
    assert list(made.pieces) == []


@pytest.mark.parametrize("steps", [1, ROUND_STEPS])
def test_finished_rows_cost_at_most_a_round(programs: RecordedPrograms, steps: int):
    expected = hash_tokens(TABLE, [5, 6], 40)
    end = next(token for i, token in enumerate(expected) if i > 8 and token not in expected[:i])
    generator = replace(making(programs), eos_ids=frozenset({end}))
    said, params = expected.index(end), replace(GREEDY, max_new_tokens=200)
    (found,) = starting(generator, [5, 6], params, streamed=steps == 1).complete()
    assert found.ids == tuple(expected[:said])
    ran = programs.count("step") + ROUND_STEPS * programs.count("decode")
    assert ran <= said + 2 * steps


# Errors


class DeviceError(RuntimeError):
    """Stands for an error of XLA."""


class Unreadable:
    """A result whose program failed."""

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, *_, **__):
        raise DeviceError("no result")


def fail(*_) -> None:
    raise DeviceError("no start")


@pytest.mark.parametrize(
    ("kind", "late"),  # when it starts, or when its result is read, if it has one
    [
        ("init", False),
        ("prefill", False),
        ("prefill", True),
        ("choose", False),
        ("choose", True),
        ("step", False),
        ("decode", False),
        ("decode", True),
    ],
)
def test_an_error_of_the_devices_fails_all_requests_and_no_later_ones(
    programs: RecordedPrograms, kind: str, late: bool
):
    engine = making(programs).engine
    kept = hear(engine, PROMPTS[1])
    if kind != "init":
        finish(engine)  # leaves keys and values, which the error takes away
        assert kept.ids == alone(PROMPTS[1])

    def replace_program(key, program):
        if key.kind != kind:
            return program
        return (lambda *args: (program(*args)[0], Unreadable())) if late else fail

    heard = [hear(engine, prompt, streamed=kind == "step") for prompt in PROMPTS]
    programs.replace = replace_program
    with pytest.raises(DeviceError):
        finish(engine)
    assert_free(engine)
    for each in heard:
        assert [type(error) for error in each.errors] == [DeviceError]
    programs.replace = lambda _, program: program
    again = [hear(engine, prompt) for prompt in PROMPTS]
    finish(engine)
    assert [each.ids for each in again] == [alone(prompt) for prompt in PROMPTS]


def test_the_thread_of_an_engine_outlives_an_error(programs: RecordedPrograms):
    generator = making(programs, threaded=True)
    programs.replace = lambda *_: fail
    for _ in range(2):
        with pytest.raises(DeviceError):
            starting(generator, PROMPTS).result()
    programs.replace = lambda _, program: program
    assert starting(generator, PROMPTS).result() == [alone(prompt) for prompt in PROMPTS]


NO_TOKEN_LEFT = replace(GREEDY, banned_tokens=range(VOCAB))


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([5, NAN], GREEDY, NonFiniteError),
        ([5, 6], replace(GREEDY, logit_bias={NAN: 100.0}), NonFiniteError),  # from its 2nd token on
        ([5, 6], NO_TOKEN_LEFT, GenerationError),
    ],
)
def test_an_error_of_one_request_fails_only_that_one(generator: Generator, prompt, params, error):
    engine = generator.engine
    heard = [hear(engine, each) for each in PROMPTS[:3]]
    wrong = hear(engine, prompt, params)
    heard += [hear(engine, each) for each in PROMPTS[3:]]
    finish(engine)
    assert [type(found) for found in wrong.errors] == [error]
    assert wrong.events[-1] is wrong.errors[0]
    assert [each.ids for each in heard] == [alone(each) for each in PROMPTS]


def test_an_exception_in_a_listener_ends_only_its_request(generator: Generator):
    engine = generator.engine
    heard = [hear(engine, prompt) for prompt in PROMPTS]
    calls = []

    def listen(event: TextPiece | BaseException) -> None:
        calls.append(event)
        raise ValueError("the client is gone")

    heard[2].request.listener = listen
    finish(engine)
    assert len(calls) == 2  # a piece, and the error
    for i in (0, 1, 3, 4, 5):
        assert heard[i].ids == alone(PROMPTS[i])


# Limits


def test_the_queue_is_bounded(programs: RecordedPrograms):
    generator = making(programs, queue_limit=2)
    engine = generator.engine
    heard = [hear(engine, prompt) for prompt in PROMPTS[:2]]
    with pytest.raises(QueueFullError, match=r"(?s)too many requests.*fewer than 2.*found: 2"):
        hear(engine, [5])
    engine.advance()
    heard += [hear(engine, prompt) for prompt in PROMPTS[2:4]]
    engine.advance()  # all four have slots
    heard += [hear(engine, prompt) for prompt in PROMPTS[4:]]
    engine.advance()
    with pytest.raises(QueueFullError):
        starting(generator, [5]).result()
    finish(engine)
    assert [each.ids for each in heard] == [alone(prompt) for prompt in PROMPTS]
    assert starting(generator, [5]).result() == alone([5])


def refusing(too_much: Callable[[Sizes], bool]) -> Callable[[Sizes], None]:
    def check(sizes: Sizes) -> None:
        if too_much(sizes):
            raise MemoryLimitError("no room")

    return check


def test_without_memory_for_more_slots_requests_wait(programs: RecordedPrograms):
    check = refusing(lambda sizes: sizes.slots > 4)
    engine = making(programs, slots=16, check_memory=check).engine
    heard = [hear(engine, prompt) for prompt in PROMPTS]
    finish(engine)
    assert engine.sizes == SIZES
    assert [each.ids for each in heard] == [alone(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("before", [0, 3])
def test_without_memory_for_a_context_only_what_needs_it_fails(
    programs: RecordedPrograms, before: int
):
    check = refusing(lambda sizes: sizes.context > 256)
    rules = replace(RULES, max_positions=1024)
    defaults = {"slots": 4, "start": SIZES, "programs": programs, "threaded": False}
    engine = make_generator(FORWARD, PARAMS, rules, check_memory=check, **defaults).engine
    heard = [hear(engine, PROMPTS[0])]
    for _ in range(before):
        engine.advance()
    large = [hear(engine, [5] * tokens) for tokens in (300, 900, 250)]
    heard += [hear(engine, prompt) for prompt in PROMPTS[1:]]
    finish(engine)
    assert [[type(e) for e in each.errors] for each in large] == [[MemoryLimitError]] * 3
    assert [each.ids for each in heard] == [alone(prompt) for prompt in PROMPTS]


# Options


def continue_without(prompt: list[int], banned: list[str], count: int) -> str:
    """Greedy text without banned strings: one that comes up is taken back to where it begins."""
    ids: list[int] = []
    excluded: dict[int, set[int]] = {}
    while len(ids) < count:
        logits = hash_logits(TABLE, prompt + ids).copy()
        logits[list(excluded.get(len(ids), ()))] = -np.inf
        ids.append(int(np.argmax(logits)))
        text = Letters().decode(ids).lower()
        starts = [text.find(string.lower()) for string in banned if string.lower() in text]
        if starts:
            excluded.setdefault(min(starts), set()).add(ids[min(starts)])
            del ids[min(starts) :]
    return Letters().decode(ids)


def test_banned_strings_do_not_come_up(generator: Generator):
    plain = Letters().decode(alone([5, 6, 7]))
    banned = [plain[0], plain[2:4].upper(), plain[5:9], "zz"]
    expected = continue_without([5, 6, 7], banned, 12)
    assert plain != expected
    for streamed in (False, True):
        assert (
            starting(generator, "fgh", banned_strings=banned, streamed=streamed).result()
            == expected
        )
    engine, made = generator.engine, starting(generator, "fgh", banned_strings=banned)
    neighbors = [hear(engine, prompt) for prompt in PROMPTS[:3]]
    assert made.result() == expected
    finish(engine)
    assert [each.ids for each in neighbors] == [alone(prompt) for prompt in PROMPTS[:3]]


def test_mirostat_with_banned_strings_does_not_depend_on_the_company(generator: Generator):
    params = SamplingParams(max_new_tokens=30, mirostat=2, mirostat_tau=2.0, mirostat_eta=0.9)
    text = starting(generator, "fgh", params).result()
    banned = [text[i : i + 2] for i in range(3, 27, 4)]
    expected = starting(generator, "fgh", params, banned_strings=banned).result()
    for delay in range(6):
        made = starting(generator, "fgh", params, banned_strings=banned)
        pieces = made.pieces
        parts = [next(pieces).text for _ in range(delay)]
        for n in range(3):
            hear(generator.engine, [n + delay, *PROMPTS[1]])
        assert "".join([*parts, *(piece.text for piece in pieces)]) == expected
        finish(generator.engine)


def test_banned_strings_that_always_come_up_are_an_error(generator: Generator):
    banned = [chr(97 + token) for token in range(VOCAB)]
    with pytest.raises(GenerationError):
        starting(
            generator, "fgh", replace(GREEDY, max_new_tokens=3), banned_strings=banned
        ).result()


@dataclass
class Alternating:
    """Allows even tokens after an odd count of tokens and odd ones after an even count; no more
    than `limit` tokens."""

    limit: int
    told: list[int] = field(default_factory=list)

    def mask(self, out: np.ndarray) -> None:
        out[:] = 0xAAAAAAAA if len(self.told) % 2 == 0 else 0x55555555

    def advance(self, token: int) -> None:
        self.told.append(token)

    def rollback(self, count: int) -> None:
        del self.told[len(self.told) - count :]

    @property
    def finished(self) -> bool:
        return len(self.told) == self.limit


def alternate(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for n in range(count):
        allowed = np.arange(VOCAB) % 2 != n % 2
        ids.append(int(np.argmax(np.where(allowed, hash_logits(TABLE, ids), -np.inf))))
    return ids[len(prompt) :]


def test_a_grammar_is_told_every_token_before_the_next_one(generator: Generator):
    engine, heard = generator.engine, []
    for i, prompt in enumerate(PROMPTS):
        each = hear(engine, prompt, stepwise=i % 2 == 0)
        each.request.matcher = Alternating(limit=9) if i % 2 == 0 else None
        heard.append(each)
        engine.advance()
    finish(engine)
    for i, prompt in enumerate(PROMPTS):
        assert heard[i].ids == (alternate(prompt, 9) if i % 2 == 0 else alone(prompt))


@dataclass
class Broken(Alternating):
    """Fails at one token."""

    where: str = "mask"

    def mask(self, out: np.ndarray) -> None:
        if self.where == "mask" and len(self.told) == 3:
            raise ValueError("broken mask")
        super().mask(out)

    def advance(self, token: int) -> None:
        if self.where == "advance" and len(self.told) == 3:
            raise ValueError("broken advance")
        super().advance(token)


@pytest.mark.parametrize("where", ["mask", "advance"])
def test_a_grammar_that_fails_ends_only_its_request(generator: Generator, where: str):
    engine = generator.engine
    wrong = hear(engine, [5, 6], stepwise=True)
    wrong.request.matcher = Broken(limit=9, where=where)
    heard = [hear(engine, prompt) for prompt in PROMPTS]
    finish(engine)
    assert [str(error) for error in wrong.errors] == [f"broken {where}"]
    assert [each.ids for each in heard] == [alone(prompt) for prompt in PROMPTS]


def test_several_samples_count_seeds_up(generator: Generator):
    params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=7)
    several = starting(generator, [[5, 6], [7]], params, n=3).result()
    single = [
        starting(generator, prompt, replace(params, seed=7 + i)).result()
        for prompt in ([5, 6], [7])
        for i in range(3)
    ]
    assert several == single
    assert len({str(ids) for ids in several}) == 6
    last = replace(params, seed=2**64 - 1)
    assert starting(generator, [5, 6], last, n=2).result()[1] == (
        starting(generator, [5, 6], replace(params, seed=0)).result()
    )


def test_echo_begins_with_the_prompt(generator: Generator):
    text = Letters().decode(alone([5, 6, 7]))
    assert starting(generator, "fgh", echo=True).result() == "fgh" + text
    assert starting(generator, [5, 6, 7], echo=True).result() == [5, 6, 7, *alone([5, 6, 7])]
    pieces = starting(generator, "fgh", echo=True, streamed=True).stream()
    assert next(pieces) == "fgh"
    assert list(pieces) == list(text)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_logprobs_are_those_of_the_model(generator: Generator):
    params = SamplingParams(max_new_tokens=12, temperature=0.5, top_k=9, logprobs=3, seed=1)
    (found,) = starting(generator, [5, 6, 7], params).complete()
    assert tuple(chosen.token for chosen in found.choices) == found.ids
    for i, chosen in enumerate(found.choices):
        expected = log_softmax(hash_logits(TABLE, [5, 6, 7, *found.ids[:i]]))
        assert chosen.logprob == pytest.approx(expected[chosen.token], abs=1e-5)
        best = np.argsort(-expected)[:3].tolist()
        assert chosen.top == tuple((t, pytest.approx(expected[t], abs=1e-5)) for t in best)


@pytest.mark.parametrize("new", [0, 4])
def test_the_tokens_of_a_prompt_are_scored(generator: Generator, new: int):
    prompt = [(7 * i) % 60 for i in range(150)]
    starting(generator, prompt).result()  # what a slot keeps of it is of no use
    neighbors = [hear(generator.engine, each) for each in PROMPTS]
    params = replace(GREEDY, max_new_tokens=new, logprobs=2)
    (found,) = starting(generator, prompt, params, prompt_logprobs=True).complete()
    assert found.ids == tuple(hash_tokens(TABLE, prompt, new))
    assert [score.token for score in found.prompt_choices] == prompt[1:]
    for i, score in enumerate(found.prompt_choices):
        expected = log_softmax(hash_logits(TABLE, prompt[: i + 1]))
        assert score.logprob == pytest.approx(expected[prompt[i + 1]], abs=1e-5)
        assert score.top[0][0] == np.argmax(expected)
    finish(generator.engine)
    assert [each.ids for each in neighbors] == [alone(each) for each in PROMPTS]


def test_a_scored_prompt_goes_back_to_its_end(generator: Generator):
    first = chr(97 + alone([5, 6, 7])[0])
    options = {"prompt_logprobs": True, "banned_strings": [first]}
    (found,) = starting(generator, "fgh", **options).complete()
    assert found.text == continue_without([5, 6, 7], [first], 12)
    assert len(found.prompt_choices) == 2


# Programs


@contextmanager
def counting_compilations() -> Iterator[list[str]]:
    found: list[str] = []

    def listen(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_over_a_thousand_mixed_requests(programs: RecordedPrograms):
    chooser, generator = random.Random(0), making(programs)
    engine = generator.engine
    with counting_compilations() as compilations:
        jax.jit(lambda x: x + 1)(np.zeros(3))
        assert compilations
        compilations.clear()
        for i in range(1_000):
            prompt = [
                chooser.randrange(VOCAB - 1)
                for _ in range(chooser.choice([1, 3, 9, 20] * 5 + [130]))
            ]
            params = SamplingParams(
                max_new_tokens=chooser.choice([1, 2] * 5 + [2 + ROUND_STEPS]),
                temperature=chooser.choice([0, 0, 0, 1.0]),
                mirostat=2 if i % 20 == 0 else 0,
                dry_multiplier=float(i % 50 == 0),
                logprobs=chooser.choice([None, 5]),
                top_p=chooser.choice([1.0] * 9 + [0.5]),
                sampler_order=chooser.sample(range(7), 7),
            )
            flags = dict.fromkeys(
                chooser.sample(["streamed", "scored", "single_steps"], 1), i % 2 == 0
            )
            hear(engine, prompt, params, **flags)
            for _ in range(chooser.randrange(3)):
                engine.advance()
        for _ in range(100_000):
            if not engine.advance():
                break
        assert_free(engine)
    assert not programs.traced
    assert not compilations
    assert {key.kind for key in programs.started} == {key.kind for key in all_keys(SIZES)}


# Threads


def storm(generator: Generator, threads: int, seed: int) -> list[str]:
    """Threads that use one engine in all ways at once; returns what was wrong."""
    faults: list[str] = []
    start = threading.Barrier(threads)

    def work(number: int) -> None:
        chooser = random.Random(threads * seed + number)
        start.wait()
        for _ in range(2):
            prompt = [chooser.randrange(60) for _ in range(chooser.choice([1, 5, 40]))]
            params = replace(GREEDY, max_new_tokens=chooser.choice([1, 8, 30]))
            try:
                chooser.choice(USES)(generator, prompt, params)
            except Exception as error:  # noqa: BLE001
                faults.append(repr(error))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    while not generator.engine.idle or engine_threads():
        time.sleep(0.01)
    return faults


def use_whole(generator: Generator, prompt: list[int], params: SamplingParams) -> None:
    assert starting(generator, prompt, params).result() == alone(prompt, params)


def use_half(generator: Generator, prompt: list[int], params: SamplingParams) -> None:
    pieces = starting(generator, prompt, params, streamed=True).stream()
    assert next(pieces) == alone(prompt, params)[:1]  # and nobody reads on
    if len(prompt) == 5:
        pieces.close()  # pyright: ignore[reportAttributeAccessIssue]


def cancel(generator: Generator, prompt: list[int], params: SamplingParams) -> None:
    heard = hear(generator.engine, prompt, params)
    if len(prompt) == 5:
        time.sleep(0.01)
    heard.request.cancelled = True


def raise_in_the_listener(generator: Generator, prompt: list[int], params: SamplingParams) -> None:
    hear(generator.engine, prompt, params).request.listener = fail


def use_nan(generator: Generator, prompt: list[int], params: SamplingParams) -> None:
    with pytest.raises(NonFiniteError):
        starting(generator, [*prompt, NAN], params).result()


USES = [use_whole, use_half, cancel, raise_in_the_listener, use_nan]


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mtj_loader_engine"]


def test_a_storm_of_threads_leaves_nothing_behind(programs: RecordedPrograms):
    generator, sizes = making(programs, threaded=True), []
    for seed in range(3):
        assert storm(generator, 64, seed) == []
        assert_free(generator.engine)
        gc.collect()
        programs.started.clear()
        kinds = (RunningRequest, TokenSequence, threading.Thread)
        left = [sum(type(thing) is kind for thing in gc.get_objects()) for kind in kinds]
        sizes.append([*left, len(jax.live_arrays())])
    assert sizes[-1] == sizes[0]
    assert sizes[-1][:2] == [0, 0]
