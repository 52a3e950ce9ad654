"""Generation for a batch of prompts: text or ids, whole or streamed in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mtj_loader.errors import NonFiniteError, TokenizerMissingError, UsageError
from mtj_loader.generation.batch import make_batch
from mtj_loader.generation.compile_ahead import NO_PROGRAMS, CompiledPrograms
from mtj_loader.generation.decode import decode
from mtj_loader.generation.prompts import Prompt, PromptLike, PromptRules, read_prompts
from mtj_loader.generation.row_output import (
    Completion,
    RowOutput,
    StopConditions,
    TextPiece,
    read_stop_strings,
)
from mtj_loader.generation.sampling import NOT_FINITE, SamplingParams, make_sampler
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.models.forward import Forward, Params

Stop = str | Sequence[str] | None


@dataclass(frozen=True)
class Generator:
    """What generation needs of a loaded model.

    Attributes:
      forward: its compiled functions.
      params: its parameters.
      tokenizer: None allows only token ids.
      eos_ids: the end-of-text tokens.
      bos_id: replaces an empty text.
      compiled: the programs compiled ahead.
      on_tokens: called for every step's tokens.
    """

    forward: Forward
    params: Params
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    bos_id: int | None
    compiled: CompiledPrograms = NO_PROGRAMS
    on_tokens: Callable[[], None] = lambda: None

    @property
    def rules(self) -> PromptRules:
        """What the model accepts as a prompt."""
        config = self.forward.config
        return PromptRules(config.vocab_size, config.max_positions, self.tokenizer, self.bos_id)


def generate(
    generator: Generator,
    prompts: PromptLike | Sequence[PromptLike],
    params: SamplingParams,
    stop: Stop = None,
) -> str | list[int] | list[str | list[int]]:
    """Continues prompts.

    Args:
      generator: the model.
      prompts: a string, token ids, or a list of either; each result is the same as for the prompt
        alone.
      params: how to choose tokens and how many.
      stop: a stop string or several; the output ends before the first match.

    Returns:
      The continuation without the prompt: text for text, ids for ids, a list for a list.

    Raises:
      PromptError: a prompt is empty, too long or outside the vocabulary.
      TokenizerMissingError: text or stop strings without a tokenizer.
      UsageError: invalid stop strings or seeds.
      NonFiniteError: the model computes NaN or infinity.
    """
    read, is_list = read_prompts(prompts, generator.rules, params.max_new_tokens)
    completions = complete(generator, read, params, stop)
    results = [_select(p, c.text, c.ids) for p, c in zip(read, completions, strict=True)]
    return results if is_list else results[0]


def stream(
    generator: Generator, prompt: PromptLike, params: SamplingParams, stop: Stop = None
) -> Iterator[str] | Iterator[list[int]]:
    """Continues one prompt and yields pieces: of text for text, of ids for ids.

    The pieces joined are what `generate` returns; none is empty. Arguments and errors are those of
    `generate`; arguments are checked at the call, not at the first piece.

    Raises:
      UsageError: more than one prompt; `stream_rows` streams several.
    """
    read, is_list = read_prompts(prompt, generator.rules, params.max_new_tokens)
    if is_list:
        raise UsageError("only one prompt can be streamed", found=f"a list of {len(read)}")
    pieces = stream_rows(generator, read, params, stop)
    results = (_select(read[0], piece.text, piece.ids) for piece in pieces)
    return (result for result in results if result)  # pyright: ignore[reportReturnType]


def complete(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, stop: Stop = None
) -> list[Completion]:
    """Continues prompts from `read_prompts`; the results include the finish reasons."""
    rows: list[list[TextPiece]] = [[] for _ in prompts]
    for piece in stream_rows(generator, prompts, params, stop):
        rows[piece.row].append(piece)
    has_text = generator.tokenizer is not None
    return [_join(prompt, row, has_text) for prompt, row in zip(prompts, rows, strict=True)]


def stream_rows(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, stop: Stop = None
) -> Iterator[TextPiece]:
    """Continues prompts from `read_prompts`; yields one piece per row and token.

    The last piece of each row has a finish_reason; the iterator ends with the last row and may be
    closed early. Arguments are checked at the call.
    """
    tokenizer = generator.tokenizer
    strings = read_stop_strings(stop)
    conditions = StopConditions(params.max_new_tokens, generator.eos_ids, strings)
    if strings and tokenizer is None:
        raise TokenizerMissingError("stop strings need a tokenizer", key="stop")
    seeds = params.seeds(len(prompts))
    rows = [RowOutput(row, tokenizer, conditions) for row in range(len(prompts))]
    return _collect(rows, _decode_tokens(generator, prompts, params, seeds))


def _decode_tokens(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, seeds: list[int]
) -> Iterator[list[int]]:
    forward, rules = generator.forward, generator.rules
    dp = forward.mesh.shape["dp"]
    compiled, new = generator.compiled, params.max_new_tokens
    batch = make_batch(prompts, new, rules.max_positions, dp, compiled.shapes)
    wait = partial(compiled.wait_for_step, batch.shape)
    seeds = seeds + [0] * (len(batch.lengths) - len(seeds))
    sampler = make_sampler(params, seeds, rules.vocab_size)
    steps = decode(forward, generator.params, batch, sampler, new, before_step=wait)
    return _notify(generator.on_tokens, steps)


def _notify(on_tokens: Callable[[], None], steps: Iterator[np.ndarray]) -> Iterator[list[int]]:
    for tokens in steps:
        on_tokens()
        yield tokens.tolist()


def _collect(rows: Sequence[RowOutput], steps: Iterator[list[int]]) -> Iterator[TextPiece]:
    while not all(row.finished for row in rows):
        tokens = next(steps)
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
