"""The scheduler and the sizes of an engine, without a model."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mtj_loader.engine.keys import all_keys, choose_key, prefill_key, round_key, step_key
from mtj_loader.engine.scheduler import (
    Decode,
    Part,
    Prefill,
    Scheduler,
    TokenSequence,
    most_of_a_group,
)
from mtj_loader.engine.sizes import ROUND_STEPS, Chunk, Sizes

SIZES = Sizes(groups=1, slots=4, context=512)


def sequence(tokens: int = 3, new: int = 20, **fields) -> TokenSequence:
    """A prompt of zeros."""
    return TokenSequence([0] * tokens, new, **fields)


def scheduling(*sequences: TokenSequence, sizes: Sizes = SIZES, **fields) -> Scheduler:
    scheduler = Scheduler(sizes, **fields)
    for each in sequences:
        scheduler.add(each)
    return scheduler


def finish_prompts(scheduler: Scheduler) -> None:
    """Runs all prompts; every token is known at once."""
    for _ in range(100):
        if scheduler.waiting or any(s.in_prompt for s in scheduler.running):
            scheduler.next_action()
            know_tokens(scheduler)
    assert not any(s.in_prompt for s in scheduler.running)


def know_tokens(scheduler: Scheduler) -> None:
    for each in scheduler.running:
        each.tokens += [0] * (each.length - len(each.tokens))


def run_and_remove(scheduler: Scheduler, *prompts: list[int]) -> None:
    """Leaves the keys and values of prompts in slots."""
    sequences = [TokenSequence(prompt, 1) for prompt in prompts]
    for each in sequences:
        scheduler.add(each)
    finish_prompts(scheduler)
    for each in sequences:
        scheduler.remove(each)


def slot_of(each: TokenSequence) -> int:
    assert each.slot is not None
    return each.slot.index


def prefill(scheduler: Scheduler) -> Prefill:
    """The next part of a prompt; a round of decoding may come before it."""
    action = scheduler.next_action()
    action = scheduler.next_action() if isinstance(action, Decode) else action
    assert isinstance(action, Prefill)
    return action


def decode(scheduler: Scheduler) -> Decode:
    action = scheduler.next_action()
    assert isinstance(action, Decode)
    return action


# Sizes


def test_widths_grow_to_the_number_of_slots():
    assert Sizes(1, 1, 64).widths == (1,)
    assert Sizes(1, 6, 64).widths == (1, 4, 6)
    assert Sizes(2, 16, 64).widths == (1, 4, 16)


def test_chunks_fit_into_the_context():
    assert Sizes(1, 1, 8).chunks == (Chunk(8),)
    assert Sizes(1, 1, 200).chunks == (Chunk(16), Chunk(128))
    assert Sizes(1, 5, 512).chunks == (
        Chunk(16),
        Chunk(128),
        Chunk(512),
        Chunk(16, rows=4),
        Chunk(16, rows=5),
    )


def test_a_long_cache_has_whole_blocks():
    assert Sizes(1, 1, 200).cache_length(256) == 200
    assert Sizes(1, 1, 257).cache_length(256) == 512


def test_sizes_grow_in_few_steps_up_to_the_limit():
    limit = Sizes(2, 10, 1000)
    start = Sizes(2, 1, 1)
    assert start.grown(1, 5, limit) == Sizes(2, 1, 256)
    assert start.grown(2, 257, limit) == Sizes(2, 4, 512)
    assert start.grown(5, 600, limit) == Sizes(2, 10, 1000)
    assert Sizes(2, 7, 700).grown(1, 1, limit) == Sizes(2, 7, 700)  # never smaller


def test_an_engine_has_few_programs():
    assert len(all_keys(Sizes(1, 16, 2048))) == len(set(all_keys(Sizes(1, 16, 2048)))) == 18


# Admission and slots


def test_sequences_are_admitted_in_order():
    sequences = [sequence() for _ in range(6)]
    scheduler = scheduling(*sequences)
    scheduler.next_action()
    assert scheduler.running == sequences[:4]
    assert list(scheduler.waiting) == sequences[4:]
    scheduler.remove(sequences[2])
    scheduler.next_action()
    assert scheduler.running == [*sequences[:2], sequences[3], sequences[4]]


def test_sequences_get_the_first_slots_of_all_groups():
    sequences = [sequence() for _ in range(5)]
    scheduling(*sequences, sizes=Sizes(2, 3, 512)).next_action()
    places = [(each.slot.group, each.slot.index) for each in sequences if each.slot]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]


def test_a_round_is_no_wider_than_the_sequences_need():
    sequences = [sequence() for _ in range(5)]
    scheduler = scheduling(*sequences, sizes=Sizes(1, 16, 512))
    finish_prompts(scheduler)
    assert decode(scheduler).width == 16
    scheduler.remove(sequences[4])
    assert decode(scheduler).width == 4
    for each in sequences[1:4]:
        scheduler.remove(each)
    assert decode(scheduler).width == 1


def test_growth_adds_slots_and_keeps_those_there():
    scheduler = scheduling(sizes=Sizes(2, 1, 256))
    run_and_remove(scheduler, list(range(30)))
    first = sequence()
    scheduler.add(first)
    scheduler.next_action()
    place = first.slot
    scheduler.grow(Sizes(2, 4, 512))
    assert len(scheduler.slots) == 8
    assert len({(slot.group, slot.index) for slot in scheduler.slots}) == 8
    assert first.slot is place
    assert first_part(scheduler, TokenSequence(list(range(30)), 1)).start == 29
    assert scheduler.sizes == Sizes(2, 4, 512)


@pytest.mark.parametrize(("groups", "sequences", "slots"), [(1, 3, 3), (2, 3, 2), (4, 9, 3)])
def test_the_slots_that_all_sequences_need(groups: int, sequences: int, slots: int):
    scheduler = scheduling(sizes=Sizes(groups, 1, 64))
    for _ in range(sequences):
        scheduler.add(sequence())
    assert scheduler.needed_slots == slots
    scheduler.next_action()
    assert scheduler.needed_slots == slots


# Kept prefixes


STORY = list(range(100))


def first_part(scheduler: Scheduler, added: TokenSequence) -> Part:
    scheduler.add(added)
    return next(part for part in prefill(scheduler).parts if part.sequence is added)


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        (STORY, 99),  # never the whole prompt: its last token gives the logits
        ([*STORY, 7, 8], 100),
        (STORY[:50], 49),
        ([*STORY[:60], 0, 0], 60),
        ([5, *STORY], 0),
    ],
)
def test_what_a_slot_holds_of_a_prompt_is_not_computed(prompt: list[int], start: int):
    scheduler = scheduling()
    run_and_remove(scheduler, STORY)
    assert first_part(scheduler, TokenSequence(prompt, 5)).start == start


def test_chosen_tokens_are_kept_too():
    scheduler = scheduling()
    story = TokenSequence(STORY, 5)
    scheduler.add(story)
    finish_prompts(scheduler)
    scheduler.next_action()  # runs the first chosen token
    story.tokens[100:] = [7, 8]
    story.length = 102
    scheduler.remove(story)
    assert first_part(scheduler, TokenSequence([*STORY, 7, 8, 9], 5)).start == 101


def test_tokens_that_are_not_known_yet_are_not_kept():
    scheduler = scheduling(round_steps=4)
    story = TokenSequence(STORY, 20)
    scheduler.add(story)
    while story.in_prompt:
        scheduler.next_action()
    scheduler.next_action()  # chooses four, of which nothing is known
    assert (story.length, story.computed, len(story.tokens)) == (105, 104, 100)
    scheduler.remove(story)
    assert list(scheduler.slots[0].tokens) == STORY


def test_a_prompt_that_was_run_in_part_is_kept_in_part():
    scheduler = scheduling(is_ready=lambda key: key.tokens == 16)
    story = TokenSequence(STORY, 5)
    scheduler.add(story)
    scheduler.next_action()
    scheduler.next_action()
    scheduler.remove(story)
    assert first_part(scheduler, TokenSequence(STORY, 5)).start == 32


def test_prefixes_are_not_shared_between_different_frequencies():
    scheduler = scheduling()
    run_and_remove(scheduler, STORY)
    assert first_part(scheduler, TokenSequence(STORY, 5, context_key="longer")).start == 0


def test_a_scored_prompt_is_run_whole():
    scheduler = scheduling()
    run_and_remove(scheduler, STORY)
    assert first_part(scheduler, TokenSequence(STORY, 5, scored=True)).start == 0


def test_nothing_is_kept_after_the_cache_was_lost():
    scheduler = scheduling()
    run_and_remove(scheduler, STORY)
    scheduler.forget_slots()
    assert first_part(scheduler, TokenSequence(STORY, 5)).start == 0


def test_a_running_sequence_shares_nothing():
    scheduler = scheduling(TokenSequence(STORY, 5))
    finish_prompts(scheduler)
    scheduler.next_action()
    assert first_part(scheduler, TokenSequence(STORY, 5)).start == 0


def test_the_slot_with_the_longest_prefix_is_used():
    scheduler = scheduling()
    run_and_remove(scheduler, [*STORY[:20], 9, 9], [*STORY[:50], 9, 9], [*STORY[:40], 9])
    story = TokenSequence(STORY, 5)
    assert first_part(scheduler, story).start == 50
    assert slot_of(story) == 1


def test_an_empty_slot_is_used_rather_than_another_story():
    scheduler = scheduling()
    run_and_remove(scheduler, STORY)
    other = sequence()
    scheduler.add(other)
    scheduler.next_action()
    assert slot_of(other) != 0


def test_a_few_equal_tokens_do_not_cost_a_long_story():
    scheduler = scheduling()
    run_and_remove(scheduler, STORY)
    other = TokenSequence([0, 1, 2, 500, 501], 5)
    scheduler.add(other)
    scheduler.next_action()
    assert slot_of(other) != 0
    longer = TokenSequence([*STORY, 5], 5)
    assert first_part(scheduler, longer).start == 100


def test_the_story_that_was_used_least_recently_is_given_up():
    scheduler = scheduling(sizes=Sizes(1, 3, 512))
    stories = [[n] * 50 for n in range(3)]
    run_and_remove(scheduler, *stories)
    run_and_remove(scheduler, stories[0])
    other = TokenSequence([9] * 50, 5)
    scheduler.add(other)
    scheduler.next_action()
    assert slot_of(other) == 1


# Chunks


@pytest.mark.parametrize(
    ("tokens", "chunk"),
    [(1, 16), (17, 16), (60, 16), (100, 128), (500, 128), (512, 512), (700, 512)],
)
def test_a_chunk_runs_the_most_tokens_for_its_cost(tokens: int, chunk: int):
    scheduler = scheduling(sequence(tokens), sizes=Sizes(1, 4, 1024))
    assert prefill(scheduler).chunk == Chunk(chunk)


def test_a_long_prompt_is_run_in_parts():
    long = sequence(700, new=1)
    scheduler, parts = scheduling(long, sizes=Sizes(1, 1, 1024)), []
    while long.in_prompt:
        parts += prefill(scheduler).parts
    ends = itertools.accumulate(part.count for part in parts)
    assert [part.start for part in parts] == [0, *list(ends)[:-1]]
    assert [part.count for part in parts] == [512, 128, 16, 16, 16, 12]
    assert [part.last for part in parts] == [False] * 5 + [True]


def test_several_short_prompts_are_run_together():
    action = prefill(scheduling(*(sequence(10) for _ in range(4))))
    assert action.chunk == Chunk(16, rows=4)
    assert len(action.parts) == 4


def test_one_short_prompt_is_run_alone():
    assert prefill(scheduling(sequence(10))).chunk == Chunk(16)


def test_every_group_runs_a_part_of_its_own():
    scheduler = scheduling(*(sequence(300) for _ in range(3)), sizes=Sizes(2, 2, 512))
    action = prefill(scheduler)
    assert action.chunk == Chunk(128)
    assert [part.sequence.slot.group for part in action.parts if part.sequence.slot] == [0, 1]


def test_a_program_that_is_not_compiled_is_used_where_it_saves_a_lot():
    def first_chunk(tokens: int) -> int:
        scheduler = scheduling(sequence(tokens), is_ready=lambda key: key.tokens == 16)
        return prefill(scheduler).chunk.tokens

    assert first_chunk(100) == 16
    assert first_chunk(500) == 16  # sixteen tokens with half of a pass
    nothing = scheduling(sequence(100), is_ready=lambda _: False)
    assert prefill(nothing).chunk == Chunk(128)


def test_scored_prompts_and_others_are_not_run_by_one_program():
    sequences = [sequence(10, scored=True), sequence(10), sequence(10)]
    scheduler = scheduling(*sequences, sizes=Sizes(2, 2, 512))
    scored, others = prefill(scheduler), None
    assert scored.scored
    assert [part.sequence for part in scored.parts] == sequences[:1]
    while not isinstance(others, Prefill):
        others = scheduler.next_action()
    assert not others.scored
    assert {part.sequence for part in others.parts} == set(sequences[1:])


def test_a_prompt_is_only_scored():
    scored = sequence(300, new=0, scored=True)
    scheduler = scheduling(scored)
    while scored.in_prompt:
        assert prefill(scheduler).scored
    assert scored.length == 300
    assert scheduler.next_action() is None


# Turns


def kinds(scheduler: Scheduler, count: int) -> str:
    """The next actions, a letter each."""
    return "".join(type(scheduler.next_action()).__name__[0] for _ in range(count))


def test_a_long_prompt_and_decoding_take_turns():
    scheduler = scheduling(sequence(new=50), is_ready=lambda key: key.tokens in {1, 16})
    finish_prompts(scheduler)
    scheduler.add(sequence(60))
    assert kinds(scheduler, 9) == "PDPDPDPDD"


def test_short_prompts_join_the_others_at_once():
    one_row = {step_key(4), prefill_key(Chunk(16))}
    scheduler = scheduling(sequence(new=50), is_ready=one_row.__contains__)
    finish_prompts(scheduler)
    scheduler.add(sequence())
    scheduler.add(sequence())
    assert kinds(scheduler, 4) == "PPDD"


def test_short_prompts_wait_while_somebody_streams():
    one_row = {step_key(4), prefill_key(Chunk(16))}
    scheduler = scheduling(sequence(new=50, streamed=True), is_ready=one_row.__contains__)
    finish_prompts(scheduler)
    scheduler.add(sequence())
    scheduler.add(sequence())
    assert kinds(scheduler, 5) == "PDPDD"


@pytest.mark.parametrize("new", [0, 1])
def test_many_prompts_that_need_no_round_do_not_keep_the_others_out(new: int):
    scheduler = scheduling(sequence(new=200))
    finish_prompts(scheduler)
    decoded = 0
    for _ in range(20):
        short = sequence(new=new, scored=not new)
        scheduler.add(short)
        decoded += isinstance(scheduler.next_action(), Decode)
        for each in [s for s in scheduler.running if s.length == s.total and not s.in_prompt]:
            scheduler.remove(each)
    assert decoded == 10


def test_parts_are_small_while_somebody_streams():
    streamed = sequence(new=50, streamed=True)
    scheduler = scheduling(streamed)
    finish_prompts(scheduler)
    scheduler.add(sequence(400))
    assert prefill(scheduler).chunk.tokens == 16
    decode(scheduler)
    scheduler.remove(streamed)
    assert prefill(scheduler).chunk.tokens > 16


def test_the_part_of_an_accelerator_is_larger():
    scheduler = scheduling(sequence(new=50, streamed=True), streaming_tokens=128)
    finish_prompts(scheduler)
    scheduler.add(sequence(400))
    assert prefill(scheduler).chunk == Chunk(128)


def test_a_streamed_prompt_is_not_slowed_down_by_itself():
    assert prefill(scheduling(sequence(400, streamed=True))).chunk == Chunk(128)


# Rounds


def test_rounds_have_several_steps_when_nobody_streams():
    scheduler = scheduling(sequence(new=50), sequence(new=5))
    finish_prompts(scheduler)
    action = decode(scheduler)
    assert action.steps == ROUND_STEPS
    first, second = scheduler.running
    assert list(action.rows) == [(first, 4), (second, 4)]
    assert (first.length, second.length) == (4 + ROUND_STEPS, 3 + 5)
    assert (first.computed, second.computed) == (3 + ROUND_STEPS, 3 + 4)


@pytest.mark.parametrize("flag", ["streamed", "single_steps", "stepwise"])
def test_rounds_have_one_step_if_one_sequence_needs_that(flag: str):
    scheduler = scheduling(sequence(new=50), sequence(new=50, **{flag: True}))
    finish_prompts(scheduler)
    assert decode(scheduler).steps == 1


def test_rounds_have_one_step_if_the_program_is_not_compiled():
    scheduler = scheduling(sequence(new=50), is_ready=lambda key: key.kind != "decode")
    finish_prompts(scheduler)
    assert decode(scheduler).steps == 1


def test_no_round_exceeds_all_limits():
    scheduler = scheduling(sequence(new=ROUND_STEPS))  # the prompt's end chooses the first token
    finish_prompts(scheduler)
    assert decode(scheduler).steps == 1


def test_a_compiled_program_is_used_although_it_is_wider():
    ready = {step_key(4), choose_key(4), round_key(4), prefill_key(Chunk(16))}
    scheduler = scheduling(sequence(new=50), is_ready=ready.__contains__)
    finish_prompts(scheduler)
    assert decode(scheduler).width == 4
    assert scheduler.width(choose_key, 1) == 4
    assert scheduling(sizes=SIZES, is_ready=lambda _: False).width(choose_key, 2) == 4


def test_a_stepwise_sequence_waits_for_its_token():
    stepwise, other = sequence(new=50, stepwise=True), sequence(new=50)
    scheduler = scheduling(stepwise, other)
    while any(each.in_prompt for each in (stepwise, other)):
        scheduler.next_action()
    assert [each for each, _ in decode(scheduler).rows] == [other]
    stepwise.tokens.append(5)
    assert {each for each, _ in decode(scheduler).rows} == {stepwise, other}


def test_nothing_is_done_while_all_wait_for_their_tokens():
    scheduler = scheduling(sequence(stepwise=True))
    prefill(scheduler)
    assert scheduler.next_action() is None


# Removal and return


def test_a_waiting_sequence_is_removed():
    first, second, third = sequence(), sequence(), sequence()
    scheduler = scheduling(first, second, third, sizes=Sizes(1, 1, 64))
    scheduler.next_action()
    scheduler.remove(second)
    assert list(scheduler.waiting) == [third]
    scheduler.remove(first)
    assert [part.sequence for part in prefill(scheduler).parts] == [third]


@pytest.mark.parametrize("actions", range(1, 8))
def test_a_sequence_is_removed_in_its_prompt_or_after_it(actions: int):
    removed, waiting = sequence(40, new=8), sequence()
    ready = lambda key: key.tokens <= ROUND_STEPS  # noqa: E731
    scheduler = scheduling(removed, waiting, sizes=Sizes(1, 1, 64), is_ready=ready)
    for _ in range(actions):
        scheduler.next_action()
    scheduler.remove(removed)
    assert [slot.sequence for slot in scheduler.slots] == [None]
    assert list(scheduler.slots[0].tokens) == [0] * min(16 * actions, 40)
    assert prefill(scheduler).parts[0].sequence is waiting


def test_a_return_chooses_again_from_there():
    story = sequence(5, new=10, single_steps=True)
    scheduler = scheduling(story)
    finish_prompts(scheduler)
    for _ in range(4):
        decode(scheduler)
        know_tokens(scheduler)
    decode(scheduler)  # its token is not known yet
    story.rewind(7)
    assert (len(story.tokens), story.length, story.computed, story.chosen) == (7, 7, 6, 2)
    assert decode(scheduler).rows == ((story, 7),)
    assert (story.length, story.computed) == (8, 7)


def test_a_return_to_the_prompt_runs_its_last_token():
    story = sequence(5, new=10)
    scheduler = scheduling(story)
    finish_prompts(scheduler)
    decode(scheduler)
    story.rewind(5)
    (part,) = prefill(scheduler).parts
    assert (part.start, part.count, part.last) == (4, 1, True)
    assert story.length == 6


# Any order of events


@dataclass(frozen=True)
class Result:
    """Tokens that were chosen, and that the host has not read yet."""

    sequence: TokenSequence
    epoch: int
    tokens: list[int]


class Devices:
    """What devices would do: what is in every slot after the programs that were started.

    Keys and values at a place depend on all tokens up to it, so here they are these tokens.
    """

    def __init__(self) -> None:
        self.cache: dict[tuple[int, int], list[object]] = {}
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self._chosen = itertools.count()

    def extend(self, each: TokenSequence, start: int, tokens: list[int]) -> None:
        """Runs tokens; what it attends to must be of the same sequence."""
        cache, known = self._of(each)
        known[start:] = tokens
        assert cache[:start] == contents(each, known[:start])
        cache[start:] = contents(each, known)[start:]

    def step(self, each: TokenSequence, length: int) -> None:
        _, known = self._of(each)
        self.extend(each, length - 1, known[length - 1 : length])

    def choose(self, each: TokenSequence, length: int) -> int:
        _, known = self._of(each)
        token = next(self._chosen) % 3
        known[length:] = [token]
        return token

    def _of(self, each: TokenSequence) -> tuple[list[object], list[int]]:
        assert each.slot is not None
        place = each.slot.group, each.slot.index
        return self.cache.setdefault(place, []), self.tokens.setdefault(place, [])


def contents(each: TokenSequence, tokens: list[int]) -> list[object]:
    return [(each.context_key, tuple(tokens[: i + 1])) for i in range(len(tokens))]


PROMPTS = st.tuples(st.integers(1, 60), st.lists(st.integers(0, 2), max_size=3)).map(
    lambda drawn: [*range(drawn[0]), *drawn[1]]  # many begin alike
)


class AnyOrder(RuleBasedStateMachine):
    """Sequences come, go back and leave at any time; results are read late."""

    @initialize(
        groups=st.integers(1, 2), slots=st.integers(1, 5), compiled=st.sets(st.integers(0, 20))
    )
    def start(self, groups: int, slots: int, compiled: set[int]):
        sizes = Sizes(groups, slots, 96)
        ready = {key for i, key in enumerate(all_keys(Sizes(groups, 6, 96))) if i in compiled}
        self.scheduler = Scheduler(sizes, is_ready=ready.__contains__, round_steps=3)
        self.devices, self.results = Devices(), deque[Result]()
        self.epochs: dict[TokenSequence, int] = {}  # of those that have not ended
        self.waits: dict[TokenSequence, int] = {}

    @rule(
        prompt=PROMPTS,
        new=st.integers(0, 12),
        flags=st.sets(st.sampled_from(["streamed", "single_steps", "stepwise", "scored"])),
        context_key=st.integers(0, 1),
    )
    def add(self, prompt: list[int], new: int, flags: set[str], context_key: int):
        added = TokenSequence(prompt, new, context_key=context_key)
        for flag in flags | (set() if new else {"scored"}):
            setattr(added, flag, True)
        self.scheduler.add(added)
        self.epochs[added] = 0

    @rule()
    def run(self):
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        due = [s for s in running if s.can_step] + [s for s in running if s.in_prompt][:1]
        action = self.scheduler.next_action()
        admitted = waiting[: len(waiting) - len(self.scheduler.waiting)]
        assert running[len(running) - len(admitted) :] == admitted
        if isinstance(action, Prefill):
            self.prefill(action)
            self.check_waits(due, {part.sequence for part in action.parts})
        elif isinstance(action, Decode):
            self.decode(action)
            self.check_waits(due, {each for each, _ in action.rows})
        else:  # everybody waits for a result, or has ended
            assert all(s.length == s.total or s.stepwise for s in running)
            assert not any(s.in_prompt for s in running)
            assert not self.scheduler.waiting or len(running) == len(self.scheduler.slots)

    def check_waits(self, due: list[TokenSequence], served: set[TokenSequence]) -> None:
        """Prompts wait for one program, and what is decoded for the prompts that join it."""
        self.waits = {s: self.waits.get(s, 0) + 1 for s in due if s not in served}
        for each, count in self.waits.items():
            alone = each.streamed or each.in_prompt
            assert count <= (1 if alone else len(self.scheduler.slots))

    def prefill(self, action: Prefill) -> None:
        chunk, sequences = action.chunk, [part.sequence for part in action.parts]
        assert len(set(sequences)) == len(sequences)
        assert most_of_a_group(sequences) <= chunk.rows
        for part in action.parts:
            each, end = part.sequence, part.start + part.count
            assert 0 < part.count <= chunk.tokens
            assert each.scored == action.scored
            self.devices.extend(each, part.start, list(each.prompt[part.start : end]))
            if part.last and each.max_new_tokens:
                token = self.devices.choose(each, len(each.prompt))
                self.results.append(Result(each, self.epochs[each], [token]))
            elif part.last:
                self.results.append(Result(each, self.epochs[each], []))

    def decode(self, action: Decode) -> None:
        assert len({each for each, _ in action.rows}) == len(action.rows)
        assert most_of_a_group(each for each, _ in action.rows) <= action.width
        for each, length in action.rows:
            assert not each.in_prompt
            assert action.steps == 1 or not (each.streamed or each.single_steps or each.stepwise)
            assert not each.stepwise or len(each.tokens) == length
            tokens = []
            for step in range(action.steps):  # of all rows alike, even if one has ended
                self.devices.step(each, length + step)
                tokens.append(self.devices.choose(each, length + step))
            self.results.append(Result(each, self.epochs[each], tokens[: each.total - length]))

    @precondition(lambda self: self.results)
    @rule()
    def read(self):
        result = self.results.popleft()
        if self.epochs.get(result.sequence) != result.epoch:
            return
        result.sequence.tokens += result.tokens
        if len(result.sequence.tokens) == result.sequence.total:
            self.end(result.sequence)

    @precondition(lambda self: self.epochs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject):
        self.end(data.draw(st.sampled_from(list(self.epochs))))

    @precondition(lambda self: any(len(s.tokens) > len(s.prompt) for s in self.epochs))
    @rule(data=st.data())
    def go_back(self, data: st.DataObject):
        known = [s for s in self.epochs if len(s.tokens) > len(s.prompt)]
        each = data.draw(st.sampled_from(known))
        each.rewind(data.draw(st.integers(len(each.prompt), len(each.tokens))))
        self.epochs[each] += 1
        self.waits.clear()

    @rule(more=st.integers(0, 2))
    def grow(self, more: int):
        sizes = self.scheduler.sizes
        self.scheduler.grow(Sizes(sizes.groups, min(6, sizes.slots + more), sizes.context))

    @rule()
    def lose_the_cache(self):
        for each in list(self.epochs):
            self.end(each)
        self.results.clear()
        self.scheduler.forget_slots()
        self.devices.cache.clear()

    def end(self, each: TokenSequence) -> None:
        del self.epochs[each]
        self.waits.clear()
        self.scheduler.remove(each)

    @invariant()
    def lengths_are_in_order(self):
        for each in self.scheduler.running:
            assert each.computed <= each.length <= each.total
            assert len(each.prompt) <= len(each.tokens) <= each.length
            assert not each.can_step or each.computed == each.length - 1

    @invariant()
    def slots_and_sequences_belong_to_each_other(self):
        taken = [slot for slot in self.scheduler.slots if slot.sequence]
        assert {slot.sequence for slot in taken} == set(self.scheduler.running)
        assert all(slot.sequence and slot.sequence.slot is slot for slot in taken)
        assert set(self.epochs) == {*self.scheduler.running, *self.scheduler.waiting}

    @invariant()
    def what_slots_keep_was_computed(self):
        for slot in self.scheduler.slots:
            if slot.sequence is None and slot.tokens:
                kept = TokenSequence(slot.tokens, 0, context_key=slot.context_key)
                cache = self.devices.cache[slot.group, slot.index]
                assert cache[: len(slot.tokens)] == contents(kept, list(slot.tokens))

    @rule()
    def finish(self):
        """Every sequence ends, within as many rounds as they have tokens."""
        for _ in range(2 * sum(each.total for each in self.epochs) + 2):
            self.run()
            while self.results:
                self.read()
        assert not self.epochs


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
