"""Runs requests: asks the scheduler what is next, starts it, and hands out results.

A program is started before the results of the one before are read, so the host's work overlaps
with that of the devices. A request that ends costs at most the program that was started meanwhile.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import jax
import numpy as np

from mtj_loader.engine.device_state import DeviceState, Turn
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.keys import Key, choose_key
from mtj_loader.engine.request import RunningRequest
from mtj_loader.engine.scheduler import Decode, Prefill, Scheduler, TokenSequence
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import MemoryLimitError, QueueFullError
from mtj_loader.sampling.result import unpack

DEFAULT_QUEUE_LIMIT = 1_000  # requests; each holds its prompt in memory

# The longest part of a prompt to run while somebody reads along: what costs about as much as a
# step. An accelerator needs more tokens to be busy while it reads the weights.
_STREAMING_TOKENS_CPU = 16
_STREAMING_TOKENS = 128


@dataclass(frozen=True)
class EngineSettings:
    """How large an engine may be.

    Attributes:
      sizes: at first.
      limit: the largest sizes; the engine grows up to them with its requests.
      queue_limit: the most requests that may wait.
    """

    sizes: Sizes
    limit: Sizes
    queue_limit: int = DEFAULT_QUEUE_LIMIT


@dataclass(frozen=True)
class _Result:
    """A row of results that belongs to a request.

    Attributes:
      request: whose it is.
      row: its row.
      epoch: of the request when the program started.
      scores: how many results for tokens of its prompt there are; 0 for chosen tokens.
    """

    request: RunningRequest
    row: int
    epoch: int
    scores: int = 0


@dataclass(frozen=True)
class _Started:
    """A program that was started.

    Attributes:
      packed: int32 [k, b, p], see `sampling.result`; without results, what is ready when it ran.
      results: which rows belong to whom.
    """

    packed: jax.Array
    results: tuple[_Result, ...]


_engines: WeakSet[Engine] = WeakSet()


@atexit.register
def _stop_all() -> None:
    """Ends all engines' threads: Python aborts if XLA returns to a thread while it finalizes."""
    for engine in list(_engines):
        engine.stop()


class Engine:
    """Runs any number of requests, from any threads, on one model.

    A thread of its own runs while there are requests. Several hosts must start the same programs in
    the same order, so there the threads that want the results do the work instead, with `advance`.

    Args:
      programs: of the model.
      params: its parameters.
      settings: of the engine.
      check_memory: is called with sizes before arrays of these sizes are made.
      threaded: whether the engine has a thread of its own.
    """

    def __init__(
        self,
        programs: Programs,
        params: object,
        settings: EngineSettings,
        *,
        check_memory: Callable[[Sizes], None] = lambda _: None,
        threaded: bool = True,
    ) -> None:
        self.threaded = threaded
        self._settings, self._programs = settings, programs
        self._check_memory = check_memory
        on_cpus = programs.forward.mesh.devices.flat[0].platform == "cpu"
        self._scheduler = Scheduler(
            settings.sizes,
            is_ready=self._is_ready,
            streaming_tokens=_STREAMING_TOKENS_CPU if on_cpus else _STREAMING_TOKENS,
        )
        self._device = DeviceState(programs, params, settings.sizes)
        self._requests: dict[TokenSequence, RunningRequest] = {}
        self._started: deque[_Started] = deque()
        self._inbox: deque[RunningRequest] = deque()
        self._lock = threading.Lock()  # of the inbox and `_running`
        self._advancing = threading.Lock()
        self._running = self._stopped = False
        self._thread: threading.Thread | None = None
        _engines.add(self)

    @property
    def sizes(self) -> Sizes:
        """The sizes now."""
        return self._scheduler.sizes

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        with self._lock:
            return not (self._running or self._inbox or self._requests)

    def submit(self, requests: Sequence[RunningRequest]) -> None:
        """Starts requests; the results go to their listeners.

        Raises:
          QueueFullError: too many requests wait already.
        """
        with self._lock:
            waiting, limit = (
                len(self._inbox) + len(self._scheduler.waiting),
                self._settings.queue_limit,
            )
            if waiting >= limit:
                raise QueueFullError(
                    "too many requests are waiting",
                    expected=f"fewer than {limit:,}",
                    found=f"{waiting:,}",
                    hint="try again later",
                )
            self._inbox.extend(requests)
            if self._running or not self.threaded:
                return
            self._running = True
            self._thread = threading.Thread(target=self._run, name="mtj_loader_engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the engine's thread after the program that it runs; requests do not end."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join()

    def advance(self) -> bool:
        """Starts what is next, and hands out the results that are due.

        Returns:
          Whether there was anything to do.
        """
        with self._advancing:
            try:
                return self._advance()
            except BaseException as error:
                self._fail_all(error)
                raise

    def _run(self) -> None:
        while True:
            try:
                while not self._stopped and self.advance():
                    pass
            except Exception:  # noqa: BLE001 -- every request was told
                pass
            with self._lock:
                if self._stopped or not self._inbox:
                    self._running = False
                    return

    def _advance(self) -> bool:
        self._take_new_requests()
        self._drop_cancelled()
        self._grow()
        action = self._scheduler.next_action()
        if action is None and not self._started:
            return False
        if action is not None:
            self._place_requests()
            self._start_round(action) if isinstance(action, Decode) else self._start_prefill(action)
        while self._started and (action is None or len(self._started) > 1):
            self._hand_out(self._started.popleft())
        return True

    def _take_new_requests(self) -> None:
        with self._lock:
            new = list(self._inbox)
            self._inbox.clear()
        for request in new:
            self._requests[request.sequence] = request
            self._scheduler.add(request.sequence)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self._requests.values() if r.cancelled]:
            self._end(request)

    def _end(self, request: RunningRequest, error: BaseException | None = None) -> None:
        del self._requests[request.sequence]
        self._scheduler.remove(request.sequence)
        if error is not None and not request.cancelled:
            request.fail(error)

    def _fail_all(self, error: BaseException) -> None:
        """Tells every request. The cache may be lost, since programs replace it."""
        self._started.clear()
        self._device.reset()
        self._take_new_requests()
        for request in list(self._requests.values()):
            self._end(request, error)
        self._scheduler.forget_slots()

    def _grow(self) -> None:
        """Makes room for the requests that wait, as far as the settings and the memory allow."""
        waiting = self._scheduler.waiting
        if not waiting:
            return
        sizes, limit = self._scheduler.sizes, self._settings.limit
        longest = max(sequence.total for sequence in waiting)
        slots = min(self._scheduler.needed_slots, limit.slots)
        fits = not self._device.empty and longest <= sizes.context
        if fits and slots <= sizes.slots:
            return
        try:
            self._resize(sizes.grown(slots, longest, limit))
        except MemoryLimitError:
            if not fits:  # else they wait for the slots that are there
                self._grow_context(longest)

    def _grow_context(self, longest: int) -> None:
        """Makes slots longer; the requests that need it fail if there is no memory for it."""
        sizes, limit = self._scheduler.sizes, self._settings.limit
        wanted = sizes.grown(sizes.slots, longest, limit)
        try:
            self._resize(wanted)
        except MemoryLimitError as error:
            for sequence in list(self._scheduler.waiting):
                if sizes.grown(sizes.slots, sequence.total, limit) == wanted:
                    self._end(self._requests[sequence], error)
            self._grow()  # for the others

    def _resize(self, sizes: Sizes) -> None:
        self._check_memory(sizes)
        self._device.resize(sizes)
        self._scheduler.grow(sizes)

    def _is_ready(self, key: Key) -> bool:
        return self._programs.is_ready(self._scheduler.sizes, key)

    def _place_requests(self) -> None:
        """Writes the settings of requests that got a slot."""
        for sequence in self._scheduler.running:
            request = self._requests[sequence]
            if not request.placed:
                assert sequence.slot is not None
                self._device.place(sequence.slot, request.settings, request.frequencies)
                request.placed = True

    def _start_round(self, action: Decode) -> None:
        turns = [self._turn(sequence, length) for sequence, length in action.rows]
        if action.steps == 1:
            self._device.step(action.width, turns)
            packed, rows = self._choose(turns)
        else:
            packed, rows = self._device.decode(action.width, turns)
        self._await(packed, rows, [sequence for sequence, _ in action.rows])

    def _start_prefill(self, action: Prefill) -> None:
        packed, rows = self._device.prefill(action)
        counts = [part.count if action.scored else 0 for part in action.parts]
        self._await(packed, rows, [p.sequence for p in action.parts if action.scored], counts)
        ended = [part.sequence for part in action.parts if part.last]
        ended = [sequence for sequence in ended if sequence.max_new_tokens]
        if ended:
            turns = [self._turn(sequence, len(sequence.prompt)) for sequence in ended]
            self._await(*self._choose(turns), ended)

    def _choose(self, turns: Sequence[Turn]) -> tuple[jax.Array, tuple[int, ...]]:
        most = max(Counter(turn.slot.group for turn in turns).values())
        return self._device.choose(self._scheduler.width(choose_key, most), turns)

    def _turn(self, sequence: TokenSequence, length: int) -> Turn:
        assert sequence.slot is not None
        request, allowed = self._requests[sequence], None
        chosen = length - len(sequence.prompt)
        try:
            allowed = request.allowed(chosen)
        except Exception as error:  # noqa: BLE001 -- of this request only
            request.fail(error)
        return Turn(sequence.slot, length, chosen, allowed)

    def _await(
        self,
        packed: jax.Array,
        rows: Sequence[int],
        sequences: Sequence[TokenSequence],
        scores: Sequence[int] = (),
    ) -> None:
        """Notes whose results a started program has."""
        requests = [self._requests[sequence] for sequence in sequences]
        counts = scores or [0] * len(requests)
        found = zip(requests, rows, counts, strict=False)
        results = tuple(_Result(r, row, r.epoch, count) for r, row, count in found)
        self._started.append(_Started(packed, results))

    def _hand_out(self, started: _Started) -> None:
        """Waits for a program, and gives its results to the requests."""
        words = np.asarray(started.packed)
        for result in started.results:
            top = result.request.top
            if result.scores:
                scores = [unpack(words[i, result.row], top) for i in range(result.scores)]
                self._give(result, lambda request, scores=scores: request.score(scores))
            else:
                for step in words[:, result.row]:
                    chosen = unpack(step, top)
                    self._give(result, lambda request, chosen=chosen: request.accept(chosen))

    def _give(self, result: _Result, take: Callable[[RunningRequest], bool]) -> None:
        """Lets a request take a result, unless it has ended or gone back meanwhile."""
        request = result.request
        if request.sequence not in self._requests or request.cancelled:
            return
        if request.epoch != result.epoch:
            return
        try:
            ended, error = take(request), None
        except Exception as raised:  # noqa: BLE001 -- of this request only, or its listener's
            ended, error = True, raised
        if ended:
            self._end(request, error)
