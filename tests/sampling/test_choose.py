"""The choice of a token: bias, bans, random draws, log-probabilities, and independent rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mtj_loader.sampling.choose import NO_TOKEN, NOT_FINITE, Choice, choose
from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.row_settings import bitmask
from tests.sampling import reference
from tests.sampling.rows import (
    EOS,
    ROWS,
    TIME,
    TOP,
    VOCAB,
    choose_jitted,
    draw,
    pad,
    run,
    stack,
)

INF = np.inf
LOGITS = np.log(np.array([1, 4, 1, 2], np.float32))  # probabilities 1/8, 1/2, 1/8, 1/4


def choose_one(logits: Sequence[float], **settings: object) -> int:
    return int(run([logits], [SamplingParams(**settings)]).tokens[0])


def test_greedy_takes_the_first_of_the_largest():
    assert choose_one([0, 3, 3, 1], temperature=0) == 1
    assert choose_one([-INF, -5, -9, -5], temperature=0) == 1
    assert choose_one([0, 3, 3, 1], temperature=9e-7) == 1


def test_greedy_ignores_what_only_drops_tokens():
    settings = {"typical_p": 0.1, "xtc_probability": 1.0, "xtc_threshold": 0.0, "mirostat": 2}
    assert choose_one(LOGITS, temperature=0, **settings) == 1
    assert choose_one(LOGITS, temperature=0, logit_bias={3: 9.0}) == 3
    assert choose_one(LOGITS, temperature=0, banned_tokens=[1]) == 3
    penalized = SamplingParams(temperature=0, presence_penalty=5)
    assert run([LOGITS], [penalized], histories=[[1, 3]]).tokens.tolist() == [0]


def test_everything_before_the_draw_equals_the_reference():
    rng = np.random.default_rng(2)
    tokens = 12  # few, so that histories repeat themselves
    logits = rng.normal(size=(ROWS, tokens)).astype(np.float32)
    histories = [rng.integers(0, 4, size=rng.integers(0, TIME + 1)).tolist() for _ in range(ROWS)]
    common = [
        {
            "logit_bias": {int(rng.integers(tokens)): 2.0, 0: -1.0},
            "banned_tokens": rng.choice(tokens, size=3).tolist(),
            "ban_eos": bool(i % 2),
            "min_new_tokens": i % 5,
            "dry_multiplier": 0.8,
            "dry_sequence_breakers": [3],
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.3,
        }
        for i in range(ROWS)
    ]
    greedy = [SamplingParams(**settings, temperature=0) for settings in common]
    found = run(logits, greedy, histories=histories, step=3).tokens
    drops = {"top_p": 0.6, "min_p": 0.1, "typical_p": 0.9, "temperature": 1.5}
    random = [SamplingParams(**settings, **drops, seed=i) for i, settings in enumerate(common)]
    drawn = run(logits, random, histories=histories, step=3).tokens
    for i in range(ROWS):
        before = reference.before_samplers(logits[i], greedy[i], histories[i], EOS, 3)
        assert found[i] == np.argmax(reference.penalties(before, greedy[i], histories[i]))
        assert reference.chain(before, random[i], histories[i])[drawn[i]] > -INF


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [[0, np.nan, 1], [0, INF, 1], [-INF, -INF, -INF]])
def test_logits_that_are_not_finite_are_marked(bad: list[float], temperature: float):
    choice = run([bad, [0, 0, 99]], [SamplingParams(temperature=temperature)] * 2)
    assert choice.tokens.tolist() == [NOT_FINITE, 2]


def test_bans_that_leave_no_token_are_marked():
    nothing = SamplingParams(banned_tokens=[0, 1, 2])
    choice = run(np.zeros((2, 3)), [nothing, SamplingParams(logprobs=1, mirostat=2)])
    assert choice.tokens[0] == NO_TOKEN
    assert choice.tokens[1] >= 0
    choice = run(np.full((1, 3), np.nan), [nothing])
    assert choice.tokens.tolist() == [NOT_FINITE]


def test_a_grammar_leaves_only_allowed_tokens():
    tokens = [3, 31, 32, 63, 269]
    allowed = np.zeros((ROWS, bitmask([], VOCAB).size), np.uint32)
    allowed[:] = bitmask(tokens, VOCAB)
    params = [SamplingParams(temperature=1e9, seed=seed) for seed in range(ROWS)]
    assert set(run(np.zeros((ROWS, 270)), params, allowed=allowed).tokens) == set(tokens)
    choice = run(np.zeros((1, 4)), [SamplingParams()], allowed=allowed & ~np.uint32(8))
    assert choice.tokens.tolist() == [NO_TOKEN]


def test_end_of_text_can_be_banned_or_delayed():
    logits = [LOGITS] * 3  # the most likely token is EOS
    params = [SamplingParams(temperature=0, **x) for x in ({"ban_eos": True}, {}, {})]
    assert run(logits, params).tokens.tolist() == [3, EOS, EOS]
    params = [SamplingParams(temperature=0, min_new_tokens=n) for n in (0, 4, 5)]
    assert run(logits, params, step=4).tokens.tolist() == [EOS, EOS, 3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [1 / 8, 4 / 8, 1 / 8, 2 / 8]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 6, 0, 2 / 6]),
        ({"temperature": 1.0, "top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"temperature": 0.5, "top_p": 0.9}, [0, 16 / 20, 0, 4 / 20]),  # temperature comes first
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # 2/3 is enough
        ({"temperature": 1e300}, [1 / 4] * 4),
        ({"temperature": 1.0, "logit_bias": {0: np.log(4)}}, [4 / 11, 4 / 11, 1 / 11, 2 / 11]),
        ({"temperature": 1.0, "banned_tokens": [1]}, [1 / 4, 0, 1 / 4, 2 / 4]),
        # at 1/4 the tokens 1 and 3 are over the threshold, and 3 is the least likely of them
        (
            {"temperature": 1.0, "xtc_threshold": 0.25, "xtc_probability": 1.0},
            [1 / 4, 0, 1 / 4, 2 / 4],
        ),
        (
            {"temperature": 1.0, "xtc_threshold": 0.25, "xtc_probability": 0.4},
            [0.6 / 8 + 0.1, 0.3, 0.6 / 8 + 0.1, 0.15 + 0.2],
        ),
        # surprises are 3, 1, 3 and 2 bits; mu starts at twice tau
        ({"temperature": 1.0, "mirostat": 2, "mirostat_tau": 1.25}, [0, 4 / 6, 0, 2 / 6]),
        ({"temperature": 1.0, "mirostat": 2, "mirostat_tau": 0.1}, [0, 1, 0, 0]),
    ],
)
def test_frequencies(settings: dict, expected: list[float]):
    tokens = draw(LOGITS, SamplingParams(**settings))
    found = np.bincount(tokens, minlength=4) / 8000
    assert np.allclose(found, expected, atol=0.023)  # four standard deviations of 8000 draws
    assert (found[np.array(expected) == 0] == 0).all()


def test_steps_of_one_row_are_independent_draws():
    steps = np.arange(8000, dtype=np.int32)
    tokens = draw(np.zeros(4), SamplingParams(temperature=1.0, seed=7), steps)
    assert np.allclose(np.bincount(tokens) / 8000, 0.25, atol=0.02)
    followed = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16) / 7999
    assert np.allclose(followed, 1 / 16, atol=0.012)


def test_mirostat_moves_towards_its_target():
    params = [SamplingParams(temperature=1.0, mirostat=2, mirostat_tau=1.5, seed=i) for i in (1, 2)]
    choice = run([LOGITS] * 2, params, mu=np.array([1.0, 2.5], np.float32))
    kept = [np.array([0, 1, 0, 0]), np.array([0, 4, 0, 2]) / 6]  # at most 1 and 2.5 bits
    for mu, before, p, token in zip(choice.mu, [1.0, 2.5], kept, choice.tokens, strict=True):
        assert np.isclose(mu, before - 0.1 * (-np.log2(p[token]) - 1.5))


def test_log_probabilities_are_those_of_the_model():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 50)).astype(np.float32) * 3
    asks = SamplingParams(temperature=2.0, top_k=5, logit_bias={7: 50.0}, logprobs=3)
    choice = run(logits, [asks, SamplingParams(), asks])
    for row in (0, 2):
        expected = np.log(reference.softmax(logits[row].astype(np.float64)))
        best = np.argsort(-expected)[:3]
        assert choice.tokens[row] == 7
        assert np.isclose(choice.logprobs[row], expected[7], rtol=1e-5)
        assert choice.top_ids[row].tolist() == best.tolist()
        assert np.allclose(choice.top_logprobs[row], expected[best], rtol=1e-5)
    assert np.isnan([choice.logprobs[1], *choice.top_logprobs[1]]).all()
    assert (choice.top_ids[1] == -1).all()


MIXED = [
    {},
    {"temperature": 0},
    {"top_p": 0.9, "logprobs": 2},
    {"top_k": 40, "min_p": 0.01, "sampler_order": [3, 0, 2, 6, 5, 4, 1]},
    {"typical_p": 0.8, "tfs": 0.95, "top_a": 0.1},
    {"mirostat": 2, "smoothing_factor": 0.2},
    {"dry_multiplier": 0.8, "dry_sequence_breakers": [5], "banned_tokens": [1, 2, 3]},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    {"dynatemp_range": 0.5, "top_n_sigma": 1.5, "xtc_probability": 0.5, "logit_bias": {9: 3}},
    {"ban_eos": True, "min_new_tokens": 3, "seed": 2**64 - 1},
]


def mixed_rows() -> tuple[np.ndarray, list[SamplingParams], list[list[int]]]:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(len(MIXED), VOCAB)).astype(np.float32) * 3
    params = [SamplingParams(**({"seed": 5} | settings)) for settings in MIXED]
    histories = [(rng.integers(0, 4, size=14) + 5 * i).tolist() for i in range(len(MIXED))]
    return logits, params, histories


def same(one: Choice, other: Choice, rows: list[int] | slice = slice(None)) -> bool:
    """Whether the choices are equal to the bit; `rows` of the second."""
    equal = partial(np.array_equal, equal_nan=True)
    return jax.tree.all(jax.tree.map(lambda x, y: equal(x, y[rows]), one, other))


def test_company_does_not_change_a_row():
    logits, params, histories = mixed_rows()
    together = run(logits, params, histories=histories, step=2)
    for i in range(len(params)):
        row = slice(i, i + 1)
        alone = run(logits[row], params[row], histories=histories[row], step=2)
        assert same(alone, together, row)


def test_neither_the_place_of_a_row_nor_what_follows_its_history_matters():
    logits, params, histories = mixed_rows()
    together = run(logits, params, histories=histories)
    order = [*range(3, len(params)), 0, 1, 2]
    moved = run(logits[order], [params[i] for i in order], histories=[histories[i] for i in order])
    assert same(moved, together, order)
    for garbage in (0, -1, 299):
        assert same(run(logits, params, histories=histories, garbage=garbage), together)


@pytest.mark.parametrize(("bad", "marked"), [(np.nan, NOT_FINITE), (-INF, NO_TOKEN)])
def test_rows_without_a_choice_do_not_disturb_others(bad: float, marked: int):
    logits, params, histories = mixed_rows()
    together = run(logits, params, histories=histories)
    spoiled = logits.copy()
    spoiled[1::2] = bad
    spoiled[1::2, 7] = 0 if marked == NO_TOKEN else 5  # one finite logit
    banned = [
        replace(row, banned_tokens=[7]) if i % 2 and marked == NO_TOKEN else row
        for i, row in enumerate(params)
    ]
    choice = run(spoiled, banned, histories=histories)
    assert (choice.tokens[1::2] == marked).all()
    assert (choice.mu[1::2] == 10).all()  # twice tau, unchanged
    even = [*range(0, len(params), 2)]
    assert np.array_equal(choice.tokens[even], together.tokens[even])


def test_new_settings_compile_nothing():
    logits, params, histories = mixed_rows()
    run(logits[:1], params[:1])
    compiled = choose_jitted._cache_size()
    for i in range(len(params)):
        run(logits[i:], params[i:], histories=histories[i:], step=i)
    assert choose_jitted._cache_size() == compiled


def test_inside_shard_map_and_scan():
    logits, params, histories = mixed_rows()
    settings = stack(params, VOCAB)
    mesh = Mesh(np.array(jax.devices()[:2]), "dp")
    rows = PartitionSpec("dp")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows)
    def generate(logits, settings, history, state):
        def step(state, _):
            lengths, steps, mu = state
            choice = choose(logits, settings, history, lengths, steps, mu, None, TOP)
            return (lengths, steps + 1, choice.mu), choice.tokens

        return jax.lax.scan(step, state, length=4)[1].T

    history, lengths = pad(histories, len(params), TIME)
    mu = settings.initial_mu
    tokens = generate(logits, settings, history, (lengths, np.zeros_like(lengths), mu))
    for step in range(4):
        choice = run(logits, params, histories=histories, step=step, mu=mu)
        assert np.array_equal(tokens[:, step], choice.tokens)
        mu = choice.mu
