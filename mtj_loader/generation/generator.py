"""Generation for a batch of prompts: text or ids, whole or streamed in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mtj_loader.errors import NonFiniteError, UsageError
from mtj_loader.generation.cache_memory import check_cache
from mtj_loader.generation.compile_ahead import NO_PROGRAMS, CompiledPrograms
from mtj_loader.generation.decode import decode
from mtj_loader.generation.prompts import (
    Prompt,
    PromptLike,
    PromptRules,
    make_batch,
    read_prompts,
)
from mtj_loader.generation.row_output import (
    Completion,
    RowOutput,
    StopConditions,
    TextPiece,
    read_stop_strings,
)
from mtj_loader.generation.sampling import NOT_FINITE, SamplingParams, make_sampler
from mtj_loader.models.forward import Forward, Params

Stop = str | Sequence[str] | None


@dataclass(frozen=True)
class Continuation:
    """Prompts that are being continued. Call one of the methods; each consumes `pieces`.

    Attributes:
      prompts: one per row.
      is_list: a list of prompts was given, so a list is returned.
      has_text: there is a tokenizer, so pieces have text.
      pieces: one per row and token. The last piece of each row has a finish_reason; the iterator
        ends with the last row and may be closed early.
    """

    prompts: list[Prompt]
    is_list: bool
    has_text: bool
    pieces: Iterator[TextPiece]

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
        results = [_select(prompt, c.text, c.ids) for prompt, c in pairs]
        return results if self.is_list else results[0]

    def stream(self) -> Iterator[str] | Iterator[list[int]]:
        """Yields the result of one prompt in pieces, none of them empty.

        Raises:
          UsageError: more than one prompt; `pieces` has those of several.
        """
        if self.is_list:
            found = f"a list of {len(self.prompts)}"
            raise UsageError("only one prompt can be streamed", found=found)
        results = (_select(self.prompts[0], piece.text, piece.ids) for piece in self.pieces)
        return (result for result in results if result)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Generator:
    """What generation needs of a loaded model.

    Attributes:
      forward: its compiled functions.
      params: its parameters.
      rules: what the model accepts as a prompt.
      eos_ids: the end-of-text tokens.
      compiled: the programs compiled ahead.
    """

    forward: Forward
    params: Params
    rules: PromptRules
    eos_ids: frozenset[int]
    compiled: CompiledPrograms = NO_PROGRAMS

    def __repr__(self) -> str:
        return f"<Generator of a {self.forward.config.model_type} model, {self.rules.tokenizer!r}>"

    def start(
        self, prompts: PromptLike | Sequence[PromptLike], params: SamplingParams, stop: Stop = None
    ) -> Continuation:
        """Checks the arguments and prepares the continuation; `pieces` runs it.

        Args:
          prompts: a string, token ids, or a list of either; each result is the same as for the
            prompt alone.
          params: how to choose tokens and how many.
          stop: a stop string or several; the output ends before the first match.

        Raises:
          PromptError: a prompt is empty, too long or outside the vocabulary.
          TokenizerMissingError: text or stop strings without a tokenizer.
          UsageError: invalid stop strings or seeds.
          NonFiniteError: from `pieces`, if the model computes NaN or infinity.
        """
        read, is_list = read_prompts(prompts, self.rules, params.max_new_tokens)
        strings = read_stop_strings(stop)
        if strings:
            self.rules.require_tokenizer("stop strings need a tokenizer", key="stop")
        tokenizer = self.rules.tokenizer
        conditions = StopConditions(params.max_new_tokens, self.eos_ids, strings)
        rows = [RowOutput(row, tokenizer, conditions) for row in range(len(read))]
        pieces = _collect(rows, self._decode(read, params))
        return Continuation(read, is_list, tokenizer is not None, pieces)

    def _decode(self, prompts: Sequence[Prompt], params: SamplingParams) -> Iterator[np.ndarray]:
        seeds, rules = params.seeds(len(prompts)), self.rules
        dp, new = self.forward.mesh.shape["dp"], params.max_new_tokens
        batch = make_batch(prompts, new, rules.max_positions, dp, self.compiled.shapes)
        check_cache(self.forward, batch.shape)
        seeds += [0] * (len(batch.lengths) - len(seeds))
        sampler = make_sampler(params, seeds, rules.vocab_size)
        wait = partial(self.compiled.wait_for_step, batch.shape)
        return decode(self.forward, self.params, batch, sampler, new, before_step=wait)


def _collect(rows: Sequence[RowOutput], steps: Iterator[np.ndarray]) -> Iterator[TextPiece]:
    while not all(row.finished for row in rows):
        tokens = next(steps).tolist()
        for row, token in zip(rows, tokens, strict=False):  # without the padding rows
            if not row.finished:
                _check_finite(token)
                yield row.push(token)


def _check_finite(token: int) -> None:
    if token == NOT_FINITE:
        hint = "load with dtype='float32', or with check_finite=True to find damaged weights"
        raise NonFiniteError("the model computed logits that are NaN or infinite", hint=hint)


def _join(prompt: Prompt, row: Sequence[TextPiece], has_text: bool) -> Completion:
    reason = row[-1].finish_reason
    assert reason is not None, "the last piece of a row has the finish reason"
    text = "".join(piece.text for piece in row) if has_text else None
    ids = tuple(token for piece in row for token in piece.ids)
    return Completion(text, ids, reason, prompt_tokens=len(prompt.ids))


def _select(prompt: Prompt, text: str | None, ids: Sequence[int]) -> str | list[int]:
    return text or "" if prompt.is_text else list(ids)
