"""Generation for prompts: text or ids, whole or streamed in pieces."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from mtj_loader.distributed.host_group import call_on_devices
from mtj_loader.engine.generate_options import TextOptions, check_new_tokens
from mtj_loader.engine.request import RunningRequest
from mtj_loader.engine.runner import Engine
from mtj_loader.engine.scheduler import TokenSequence
from mtj_loader.errors import UsageError
from mtj_loader.generation.prompts import Prompt, PromptLike, PromptRules, read_prompts
from mtj_loader.generation.row_output import (
    Completion,
    RowOutput,
    StopConditions,
    TextPiece,
    read_strings,
)
from mtj_loader.grammar.compile_grammar import Grammar, read_grammar
from mtj_loader.sampling.breakers import breaker_tokens, default_breaker_tokens, token_texts
from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.row_settings import row_settings


@dataclass(frozen=True)
class Continuation:
    """Prompts that are being continued. Call one of the methods; each consumes `pieces`.

    Attributes:
      prompts: one per row.
      is_list: a list of prompts was given or several continuations asked for, so a list is
        returned.
      has_text: there is a tokenizer, so pieces have text.
      echo: whether results begin with the prompt.
      pieces: at least one per row. The last piece of each row has a finish_reason; the iterator
        ends with the last row and may be closed early, which ends the requests.
    """

    prompts: list[Prompt]
    is_list: bool
    has_text: bool
    pieces: Iterator[TextPiece]
    echo: Callable[[Prompt], str | list[int]] | None = None

    def complete(self) -> list[Completion]:
        """Waits for all rows; the results include the finish reasons."""
        rows: list[list[TextPiece]] = [[] for _ in self.prompts]
        for piece in self.pieces:
            rows[piece.row].append(piece)
        pairs = zip(self.prompts, rows, strict=True)
        return [_join(prompt, row, self.has_text) for prompt, row in pairs]

    def result(self) -> str | list[int] | list[str | list[int]]:
        """Waits for all rows; returns text for text, ids for ids, a list for a list."""
        pairs = zip(self.prompts, self.complete(), strict=True)
        results = [self._with_prompt(p, _select(p, c.text, c.ids)) for p, c in pairs]
        return results if self.is_list else results[0]

    def stream(self) -> Iterator[str] | Iterator[list[int]]:
        """Yields the result of one prompt in pieces, none of them empty.

        Raises:
          UsageError: more than one prompt; `pieces` has those of several.
        """
        if self.is_list:
            found = f"a list of {len(self.prompts)}"
            raise UsageError("only one prompt can be streamed", found=found)
        return self._stream(self.prompts[0])  # pyright: ignore[reportReturnType]

    def _stream(self, prompt: Prompt) -> Iterator[str | list[int]]:
        if self.echo is not None:
            yield self.echo(prompt)
        with closing(self.pieces):  # pyright: ignore[reportArgumentType]
            for piece in self.pieces:
                if result := _select(prompt, piece.text, piece.ids):
                    yield result

    def _with_prompt(self, prompt: Prompt, result: Any) -> Any:  # noqa: ANN401 -- text or ids
        return result if self.echo is None else self.echo(prompt) + result


@dataclass(frozen=True)
class Generator:
    """What generation needs of a loaded model.

    Attributes:
      engine: runs the requests.
      rules: what the model accepts as a prompt.
      eos_ids: the end-of-text tokens.
      frequencies: of the rotary embeddings for rows of so many tokens.
    """

    engine: Engine
    rules: PromptRules
    eos_ids: frozenset[int]
    frequencies: Callable[[list[int]], tuple[Any, ...]]

    def __repr__(self) -> str:
        return f"<Generator with {self.rules.tokenizer!r}>"

    def start(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams,
        options: TextOptions | None = None,
        *,
        seeds: Sequence[int] | None = None,
        streamed: bool = False,
    ) -> Continuation:
        """Checks the arguments and prepares the requests, which start with the first piece.

        Args:
          prompts: a string, token ids, or a list of either; each result is the same as for the
            prompt alone.
          params: how to choose tokens and how many.
          options: what else is asked for.
          seeds: one for each prompt, instead of that of `params`.
          streamed: somebody reads the pieces as they come.

        Raises:
          PromptError: a prompt is empty, too long or outside the vocabulary.
          TokenizerMissingError: text or strings without a tokenizer.
          UsageError: options or seeds are wrong, or a grammar is.
          NonFiniteError: from `pieces`, if the model computes NaN or infinity.
          GenerationError: from `pieces`, if a request cannot go on.
          QueueFullError: from `pieces`, if too many requests wait.
        """
        options = options or TextOptions()
        check_new_tokens(params, options)
        read, is_list = read_prompts(prompts, self.rules, params.max_new_tokens)
        first_seeds = _check_seeds(seeds, len(read)) or [params.seed] * len(read)
        params = self._add_breakers(params, options)
        conditions = self._conditions(params, options)
        grammar = self._read_grammar(options)
        rows = [
            (prompt, seed + i)
            for prompt, seed in zip(read, first_seeds, strict=True)
            for i in range(options.n)
        ]

        def run() -> Iterator[TextPiece]:
            events: queue.SimpleQueue[TextPiece | BaseException] = queue.SimpleQueue()
            requests = [
                self._request(row, prompt, replace(params, seed=seed % 2**64), conditions, events)
                for row, (prompt, seed) in enumerate(rows)
            ]
            for request in requests:
                request.matcher = None if grammar is None else grammar.start()
                # Mirostat's state after a return depends on the tokens that were taken back, so
                # none may be chosen meanwhile.
                surprise = bool(params.mirostat and conditions.banned_strings)
                request.sequence.stepwise = grammar is not None or surprise
                request.sequence.streamed = streamed
                request.sequence.single_steps = bool(conditions.banned_strings)
                request.sequence.scored = options.prompt_logprobs
                request.top = params.logprobs or 0
            return _run(self.engine, requests, events)

        return Continuation(
            [prompt for prompt, _ in rows],
            is_list or options.n > 1,
            self.rules.tokenizer is not None,
            _deferred(run),
            self._echo if options.echo else None,
        )

    def _add_breakers(self, params: SamplingParams, options: TextOptions) -> SamplingParams:
        """Adds the tokens of DRY's sequence breakers."""
        given, rules = options.dry_sequence_breakers, self.rules
        items = [given] if isinstance(given, str) else given or ()
        texts = [item for item in items if isinstance(item, str)]
        if texts:
            rules.require_tokenizer(
                "texts as breakers need a tokenizer", key="dry_sequence_breakers"
            )
            ids = breaker_tokens(texts, self._token_texts) if params.dry_multiplier else ()
        elif given is not None:
            ids = cast("Sequence[int]", given)
        elif not params.dry_multiplier or params.dry_sequence_breakers or rules.tokenizer is None:
            return params
        else:
            ids = default_breaker_tokens(self._token_texts)
        return replace(params, dry_sequence_breakers=ids)

    @cached_property
    def _token_texts(self) -> list[str]:
        assert self.rules.tokenizer is not None
        return token_texts(self.rules.tokenizer.backend)[: self.rules.vocab_size]

    def _conditions(self, params: SamplingParams, options: TextOptions) -> StopConditions:
        texts = {}
        for name in ("stop", "banned_strings"):
            texts[name] = read_strings(name, getattr(options, name))
            if texts[name]:
                what = f"{name.replace('_', ' ')} need a tokenizer".replace("stop", "stop strings")
                self.rules.require_tokenizer(what, key=name)
        new = params.max_new_tokens
        return StopConditions(new, self.eos_ids, texts["stop"], texts["banned_strings"])

    def _read_grammar(self, options: TextOptions) -> Grammar | None:
        if options.grammar is None and options.json_schema is None:
            return None
        rules, key = self.rules, "json_schema" if options.grammar is None else "grammar"
        tokenizer = rules.require_tokenizer(f"{key} needs a tokenizer", key=key)
        schema = options.json_schema
        schema = dict(schema) if isinstance(schema, Mapping) else schema
        return read_grammar(options.grammar, schema, tokenizer, self.eos_ids, rules.vocab_size)

    def _request(
        self,
        row: int,
        prompt: Prompt,
        params: SamplingParams,
        conditions: StopConditions,
        events: queue.SimpleQueue[TextPiece | BaseException],
    ) -> RunningRequest:
        frequencies = self.frequencies([len(prompt.ids) + params.max_new_tokens])
        key = tuple(array.tobytes() for array in frequencies)
        sequence = TokenSequence(prompt.ids, params.max_new_tokens, context_key=key)
        vocab_size = self.rules.vocab_size
        settings = row_settings(params, vocab_size=vocab_size, eos_ids=sorted(self.eos_ids))
        output = RowOutput(row, self.rules.tokenizer, conditions)
        return RunningRequest(sequence, settings, frequencies, vocab_size, output, events.put)

    @staticmethod
    def _echo(prompt: Prompt) -> str | list[int]:
        return list(prompt.ids) if prompt.text is None else prompt.text


def _deferred(run: Callable[[], Iterator[TextPiece]]) -> Iterator[TextPiece]:
    """What `run` returns; it is called for the first piece."""
    yield from run()


def _run(
    engine: Engine,
    requests: Sequence[RunningRequest],
    events: queue.SimpleQueue[TextPiece | BaseException],
) -> Iterator[TextPiece]:
    """Runs requests and yields their pieces; ends all of them when it is closed."""
    left = len(requests)
    try:
        engine.submit(requests)
        while left:
            if not engine.threaded:
                _advance(engine, events)
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            left -= event.finish_reason is not None
            yield event
    finally:
        for request in requests:
            request.cancelled = True


def _advance(engine: Engine, events: queue.SimpleQueue[TextPiece | BaseException]) -> None:
    """Runs an engine without a thread until there is a piece.

    Raises:
      HostError: another host failed, which is noticed while devices wait for it.
    """
    while events.empty() and call_on_devices(engine.advance):
        pass


def _check_seeds(seeds: Sequence[int] | None, rows: int) -> list[int]:
    if seeds is None:
        return []
    if len(seeds) != rows:
        raise UsageError(
            "the list of seeds and the list of prompts differ in length",
            key="seed",
            expected=f"{rows} seeds, or one integer",
            found=len(seeds),
        )
    return [SamplingParams(seed=seed).seed for seed in seeds]


def _join(prompt: Prompt, row: Sequence[TextPiece], has_text: bool) -> Completion:
    reason = row[-1].finish_reason
    assert reason is not None, "the last piece of a row has the finish reason"
    return Completion(
        "".join(piece.text for piece in row) if has_text else None,
        tuple(token for piece in row for token in piece.ids),
        reason,
        len(prompt.ids),
        tuple(chosen for piece in row for chosen in piece.choices),
        tuple(chosen for piece in row for chosen in piece.prompt_choices),
    )


def _select(prompt: Prompt, text: str | None, ids: Sequence[int]) -> str | list[int]:
    return text or "" if prompt.is_text else list(ids)
