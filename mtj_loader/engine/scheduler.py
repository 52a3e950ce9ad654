"""Decides what runs next. It knows no arrays: its tests need no model.

A sequence waits for a slot, runs the part of its prompt that the slot does not hold yet, and then
chooses tokens. Parts of prompts take turns with rounds of decoding, so that nobody waits for the
end of another's long prompt.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from mtj_loader.engine.keys import Key, prefill_key, round_key, step_key
from mtj_loader.engine.sizes import ROUND_STEPS, Chunk, Sizes

_WORTH_KEEPING = 16  # tokens: to compute fewer again costs one pass at most
_UNCOMPILED = 1 / 8  # how much less a program is worth that has to be compiled first


@dataclass(eq=False)
class TokenSequence:
    """A prompt and the tokens that follow it.

    Attributes:
      prompt: at least one token.
      max_new_tokens: how many tokens to choose.
      streamed: somebody reads every token as it comes.
      single_steps: rounds that it is in choose one token.
      stepwise: every token must be known before the next one is chosen.
      scored: the log-probabilities of the prompt's tokens are wanted.
      context_key: keys and values are only shared between sequences with equal keys.
      tokens: the prompt and the chosen tokens that are known.
      length: the number of tokens, with those that are being chosen.
      computed: the number of tokens whose keys and values are in the slot, or will be.
      slot: where they are.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    streamed: bool = False
    single_steps: bool = False
    stepwise: bool = False
    scored: bool = False
    context_key: Hashable = None
    tokens: list[int] = field(init=False)
    length: int = field(init=False)
    computed: int = 0
    slot: Slot | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.length = len(self.tokens)

    @property
    def total(self) -> int:
        """The most tokens it may reach."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def chosen(self) -> int:
        """How many tokens were chosen, with those that are being chosen."""
        return self.length - len(self.prompt)

    @property
    def in_prompt(self) -> bool:
        """Whether some of its prompt has to run before a token can be chosen."""
        return self.computed < len(self.prompt)

    @property
    def can_step(self) -> bool:
        """Whether the next token can be chosen now."""
        waits = self.stepwise and self.length > len(self.tokens)
        return not self.in_prompt and not waits and self.length < self.total

    def rewind(self, length: int) -> None:
        """Returns to its first tokens, at least one, to choose the following ones again."""
        del self.tokens[length:]
        self.length = length
        self.computed = min(self.computed, length - 1)


@dataclass(eq=False)
class Slot:
    """Room for one sequence in the cache.

    Attributes:
      group: the group of devices.
      index: the place in the group.
      tokens: whose keys and values it holds when no sequence runs in it.
      context_key: of these tokens.
      used: when it was used last.
      sequence: what runs in it.
    """

    group: int
    index: int
    tokens: Sequence[int] = ()
    context_key: Hashable = None
    used: int = 0
    sequence: TokenSequence | None = None

    def shared(self, sequence: TokenSequence) -> int:
        """How many of the first tokens of a prompt need not be computed; not the last one."""
        if self.context_key != sequence.context_key or sequence.scored:
            return 0
        prompt, kept = list(sequence.prompt[:-1]), list(self.tokens)
        longest = min(len(prompt), len(kept))
        return bisect.bisect_left(range(1, longest + 1), True, key=lambda n: prompt[:n] != kept[:n])


@dataclass(frozen=True)
class Part:
    """A part of a prompt."""

    sequence: TokenSequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether a token is chosen after it."""
        return self.start + self.count == len(self.sequence.prompt)


@dataclass(frozen=True)
class Prefill:
    """Runs parts of prompts."""

    chunk: Chunk
    parts: tuple[Part, ...]
    scored: bool


@dataclass(frozen=True)
class Decode:
    """Chooses `steps` tokens for each sequence, at most `width` of each group.

    Sequences come with their lengths before that.
    """

    width: int
    steps: int
    rows: tuple[tuple[TokenSequence, int], ...]


Action = Prefill | Decode


class Scheduler:
    """The waiting and running sequences, and the slots.

    Args:
      sizes: of the engine.
      is_ready: whether a program is compiled. Others are used only where that saves a lot.
      streaming_tokens: the longest part of a prompt to run while somebody reads along.
      round_steps: of decoding at a time, when nobody reads along.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        is_ready: Callable[[Key], bool] = lambda _: True,
        streaming_tokens: int = 16,
        round_steps: int = ROUND_STEPS,
    ) -> None:
        self.sizes = sizes
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []  # in the order of admission
        self.slots = _make_slots(sizes)
        self._is_ready = is_ready
        self._streaming_tokens, self._round_steps = streaming_tokens, round_steps
        self._clock = 0
        self._decode_next = False

    def add(self, sequence: TokenSequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Forgets a sequence at any moment; what its slot holds can be used again."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        slot, known = sequence.slot, min(sequence.computed, len(sequence.tokens))
        slot.tokens, slot.sequence = tuple(sequence.tokens[:known]), None
        self._clock += 1
        slot.used = self._clock
        self.running.remove(sequence)

    def grow(self, sizes: Sizes) -> None:
        """Adds slots; those there are keep what they hold."""
        there = {(slot.group, slot.index) for slot in self.slots}
        self.slots += [s for s in _make_slots(sizes) if (s.group, s.index) not in there]
        self.sizes = sizes

    def forget_slots(self) -> None:
        """Forgets what the slots hold, after the cache was lost."""
        for slot in self.slots:
            slot.tokens = ()

    @property
    def needed_slots(self) -> int:
        """How many slots of each group would let every sequence run."""
        return -(-(len(self.running) + len(self.waiting)) // self.sizes.groups)

    def width(self, make_key: Callable[[int], Key], least: int) -> int:
        """The rows for each group of a program that needs at least so many; compiled, if any is."""
        fitting = [width for width in self.sizes.widths if width >= least]
        return next((width for width in fitting if self._is_ready(make_key(width))), fitting[0])

    def next_action(self) -> Action | None:
        """What to run now, on the assumption that it will run; None if nothing can."""
        self._admit()
        in_prompt = [s for s in self.running if s.in_prompt]
        steppable = [s for s in self.running if s.can_step]
        streaming = any(s.streamed for s in steppable)
        if in_prompt and not (steppable and self._decode_next):
            action = self._prefill(in_prompt, streaming)
            # Prompts that end at once join the others first, unless somebody reads along. Those
            # that choose one token or none need no round: a row of them would keep the others out.
            joining = all(p.last and p.sequence.max_new_tokens > 1 for p in action.parts)
            self._decode_next = streaming or not joining
            return action
        self._decode_next = False
        return self._decode(steppable) if steppable else None

    def _admit(self) -> None:
        while self.waiting and (free := [s for s in self.slots if s.sequence is None]):
            sequence = self.waiting.popleft()
            slot = self._choose_slot(sequence, free)
            sequence.computed = slot.shared(sequence)
            sequence.slot, slot.sequence = slot, sequence
            slot.tokens, slot.context_key = (), sequence.context_key
            self.running.append(sequence)

    def _choose_slot(self, sequence: TokenSequence, free: Sequence[Slot]) -> Slot:
        """The slot that saves the most work, or else the one whose loss costs the least."""
        best = max(free, key=lambda slot: slot.shared(sequence))
        shared = best.shared(sequence)
        if shared >= _WORTH_KEEPING or (shared and shared == len(best.tokens)):
            return best
        return min(free, key=lambda slot: (slot.used if slot.tokens else 0, slot.index))

    def _prefill(self, in_prompt: Sequence[TokenSequence], streaming: bool) -> Prefill:
        """The chunk that runs the most tokens of prompts for its cost; the oldest is in it."""
        oldest = in_prompt[0]
        chunks = self.sizes.chunks
        if streaming:
            longest = max(self._streaming_tokens, chunks[0].tokens)
            chunks = tuple(chunk for chunk in chunks if chunk.tokens <= longest)
        found = [
            Prefill(chunk, _parts(in_prompt, chunk), scored=oldest.scored)
            for chunk in chunks
            if chunk.rows == 1 or not oldest.scored
        ]
        action = max(found, key=self._worth)
        for part in action.parts:
            part.sequence.computed += part.count
            if part.last and part.sequence.max_new_tokens:
                part.sequence.length += 1  # the first token is chosen right after
        return action

    def _worth(self, action: Prefill) -> tuple[float, int]:
        useful = sum(part.count for part in action.parts)
        ready = (
            1 if self._is_ready(prefill_key(action.chunk, scored=action.scored)) else _UNCOMPILED
        )
        return ready * action.chunk.efficiency(useful), useful

    def _decode(self, sequences: Sequence[TokenSequence]) -> Decode:
        most = most_of_a_group(sequences)
        steps = self._round_steps
        single = any(s.streamed or s.single_steps or s.stepwise for s in sequences)
        single |= any(s.in_prompt for s in self.running)  # they wait for the end of the round
        left = max(s.total - s.length for s in sequences)
        width = self.width(round_key, most)
        if single or left < steps or not self._is_ready(round_key(width)):
            steps, width = 1, self.width(step_key, most)
        rows = tuple((sequence, sequence.length) for sequence in sequences)
        for sequence in sequences:
            taken = min(steps, sequence.total - sequence.length)
            sequence.computed += taken
            sequence.length += taken
        return Decode(width, steps, rows)


def _parts(in_prompt: Sequence[TokenSequence], chunk: Chunk) -> tuple[Part, ...]:
    """The parts of prompts that a chunk can run: of the oldest sequences of each group."""
    taken: list[Part] = []
    of_groups: Counter[int] = Counter()
    for sequence in in_prompt:
        assert sequence.slot is not None
        group = sequence.slot.group
        mixed = bool(taken) and taken[0].sequence.scored != sequence.scored
        if of_groups[group] == chunk.rows or mixed:
            continue
        of_groups[group] += 1
        count = min(chunk.tokens, len(sequence.prompt) - sequence.computed)
        taken.append(Part(sequence, sequence.computed, count))
    return tuple(taken)


def most_of_a_group(sequences: Iterable[TokenSequence]) -> int:
    """How many rows a group needs so that all sequences run."""
    return max(Counter(s.slot.group for s in sequences if s.slot is not None).values())


def _make_slots(sizes: Sizes) -> list[Slot]:
    """All slots, the first of every group before the second."""
    return [Slot(group, index) for index in range(sizes.slots) for group in range(sizes.groups)]
