"""Prompts in, text or ids out: whole, or piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mtj_loader.errors import NonFiniteError, TokenizerMissingError, UsageError
from mtj_loader.generation.batch import make_batch
from mtj_loader.generation.compile_ahead import NOTHING, Compiled
from mtj_loader.generation.decode import decode
from mtj_loader.generation.prompts import Prompt, PromptLike, PromptRules, read_prompts
from mtj_loader.generation.row_output import Completion, Piece, RowOutput, StopConditions
from mtj_loader.generation.sampling import NOT_FINITE, SamplingParams, make_sampler
from mtj_loader.generation.stopping import stop_strings
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.models.forward import Forward, Params

Stop = str | Sequence[str] | None


@dataclass(frozen=True)
class Generator:
    """A loaded model, as far as making text needs it.

    Attributes:
      forward: its compiled functions.
      params: its parameters.
      tokenizer: None leaves token ids only.
      eos_ids: the end-of-text tokens.
      bos_id: stands in for an empty text.
      compiled: what was compiled ahead.
      on_tokens: called whenever there are new tokens.
    """

    forward: Forward
    params: Params
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    bos_id: int | None
    compiled: Compiled = NOTHING
    on_tokens: Callable[[], None] = lambda: None

    @property
    def rules(self) -> PromptRules:
        """What it accepts as a prompt."""
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
      prompts: a string, token ids, or a list of either; each gives what it would give alone.
      params: how to choose tokens and how many.
      stop: end before this string, or before the first of these.

    Returns:
      The continuation without the prompt: text for text, ids for ids, a list for a list.

    Raises:
      PromptError: a prompt that is empty, too long or not of this vocabulary.
      TokenizerMissingError: text or stop strings, and no tokenizer.
      UsageError: stop strings or seeds that cannot be.
      NonFiniteError: the model computes NaN or infinity.
    """
    read, is_list = read_prompts(prompts, generator.rules, params.max_new_tokens)
    whole = complete(generator, read, params, stop)
    results = [_result(p, c.text, c.ids) for p, c in zip(read, whole, strict=True)]
    return results if is_list else results[0]


def stream(
    generator: Generator, prompt: PromptLike, params: SamplingParams, stop: Stop = None
) -> Iterator[str] | Iterator[list[int]]:
    """Continues one prompt piece by piece: pieces of text for text, of ids for ids.

    The pieces together are what `generate` returns, and none is empty. Arguments and errors are
    those of `generate`; what is wrong with the arguments is raised here, not by the first piece.

    Raises:
      UsageError: more than one prompt; `pieces` streams several at once.
    """
    read, is_list = read_prompts(prompt, generator.rules, params.max_new_tokens)
    if is_list:
        raise UsageError("only one prompt can be streamed", found=f"a list of {len(read)}")
    made = pieces(generator, read, params, stop)
    results = (_result(read[0], piece.text, piece.ids) for piece in made)
    return (result for result in results if result)  # pyright: ignore[reportReturnType]


def complete(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, stop: Stop = None
) -> list[Completion]:
    """Continues prompts that `read_prompts` checked; says also why each row ended."""
    made: list[list[Piece]] = [[] for _ in prompts]
    for piece in pieces(generator, prompts, params, stop):
        made[piece.row].append(piece)
    has_text = generator.tokenizer is not None
    return [_joined(p, parts, has_text) for p, parts in zip(prompts, made, strict=True)]


def pieces(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, stop: Stop = None
) -> Iterator[Piece]:
    """Continues prompts that `read_prompts` checked: a piece per row and token, as they are made.

    The last piece of each row has a finish_reason; the iterator ends with the last row. Closing it
    early is fine. Arguments are checked at the call.
    """
    tokenizer = generator.tokenizer
    ending = StopConditions(params.max_new_tokens, generator.eos_ids, stop_strings(stop))
    if ending.stops and tokenizer is None:
        raise TokenizerMissingError("stop strings need a tokenizer", key="stop")
    seeds = params.seeds(len(prompts))
    transcripts = [RowOutput(row, tokenizer, ending) for row in range(len(prompts))]
    return _follow(transcripts, _tokens(generator, prompts, params, seeds))


def _tokens(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, seeds: list[int]
) -> Iterator[list[int]]:
    forward, rules = generator.forward, generator.rules
    dp = forward.mesh.shape["dp"]
    compiled, new = generator.compiled, params.max_new_tokens
    batch = make_batch(prompts, new, rules.max_positions, dp, compiled.shapes)
    ready = partial(compiled.wait_for_step, batch.shape)
    seeds = seeds + [0] * (len(batch.lengths) - len(seeds))
    sampler = make_sampler(params, seeds, rules.vocab_size)
    steps = decode(forward, generator.params, batch, sampler, new, before_step=ready)
    return _told(generator.on_tokens, steps)


def _told(on_tokens: Callable[[], None], steps: Iterator[np.ndarray]) -> Iterator[list[int]]:
    for tokens in steps:
        on_tokens()
        yield tokens.tolist()


def _follow(transcripts: Sequence[RowOutput], steps: Iterator[list[int]]) -> Iterator[Piece]:
    while not all(transcript.finished for transcript in transcripts):
        tokens = next(steps)
        for transcript, token in zip(transcripts, tokens, strict=False):  # not the padding rows
            if not transcript.finished:
                yield transcript.push(_checked(token))


def _checked(token: int) -> int:
    if token == NOT_FINITE:
        hint = "load with dtype='float32', or with check_finite=True to look for damaged weights"
        raise NonFiniteError("the model computes logits that are NaN or infinite", hint=hint)
    return token


def _joined(prompt: Prompt, parts: Sequence[Piece], has_text: bool) -> Completion:
    reason = parts[-1].finish_reason
    assert reason is not None, "the last piece of a row says why it is the last"
    text = "".join(part.text for part in parts) if has_text else None
    ids = tuple(token for part in parts for token in part.ids)
    return Completion(text, ids, reason, prompt_tokens=len(prompt.ids))


def _result(prompt: Prompt, text: str | None, ids: Sequence[int]) -> str | list[int]:
    return text or "" if prompt.is_text else list(ids)
