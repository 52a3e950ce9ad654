"""The keyword arguments of `Model.generate`, each defined and documented once.

The command line takes their names, types, defaults and descriptions from here too, so nothing here
imports JAX.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

from mtj_loader.errors import UsageError
from mtj_loader.sampling.breakers import Breakers, check_breakers
from mtj_loader.sampling.params import SamplingParams

Strings = str | Sequence[str] | None

_MAX_SAMPLES = 128  # of one prompt, as in OpenAI's API
_F = TypeVar("_F", bound=Callable[..., object])


@dataclass(frozen=True)
class TextOptions:
    """What a request asks for besides the sampling settings.

    Attributes:
      stop: end before this string, or before the first of several.
      banned_strings: strings that the text must not contain, whatever their case.
      grammar: text must follow this grammar, in GBNF.
      json_schema: text must be JSON that follows this schema.
      n: how many continuations of each prompt; seeds are counted up from the given one.
      echo: whether results begin with the prompt.
      prompt_logprobs: whether the prompt's tokens get log-probabilities too.
      dry_sequence_breakers: texts that no repeated sequence contains, or ids of tokens. None is a
        line break, a colon, a double quote and an asterisk, as in koboldcpp. A text breaks where it
        is within a token; an empty list breaks nowhere.

    Raises:
      UsageError: a value is out of range.
    """

    stop: Strings = None
    banned_strings: Strings = None
    grammar: str | None = None
    json_schema: Mapping[str, Any] | str | bool | None = None
    n: int = 1
    echo: bool = False
    prompt_logprobs: bool = False
    dry_sequence_breakers: Breakers = None

    def __post_init__(self) -> None:
        check_breakers(self.dry_sequence_breakers)
        if type(self.n) is not int or not 1 <= self.n <= _MAX_SAMPLES:
            expected = f"an integer, 1 to {_MAX_SAMPLES}"
            raise UsageError("n is out of range", key="n", expected=expected, found=repr(self.n))
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("a grammar and a schema exclude each other", key="json_schema")


_CLASSES = (SamplingParams, TextOptions)  # of a field of both, that of the second counts


class GenerateKeywords(TypedDict, total=False):
    """The fields of SamplingParams and TextOptions as keyword arguments, for type checkers."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    top_a: float
    tfs: float
    typical_p: float
    top_n_sigma: float
    dynatemp_range: float
    dynatemp_exponent: float
    smoothing_factor: float
    smoothing_curve: float
    repetition_penalty: float
    repetition_penalty_range: int
    repetition_penalty_slope: float
    repetition_penalty_curve: Literal["koboldcpp", "kobold"]
    presence_penalty: float
    frequency_penalty: float
    xtc_threshold: float
    xtc_probability: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_range: int
    dry_sequence_breakers: Breakers
    mirostat: Literal[0, 2]
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: Mapping[int, float]
    banned_tokens: Sequence[int]
    ban_eos: bool
    min_new_tokens: int
    sampler_order: Sequence[int]
    seed: int | Sequence[int]
    logprobs: int | None
    stop: Strings
    banned_strings: Strings
    grammar: str | None
    json_schema: Mapping[str, Any] | str | bool | None
    n: int
    echo: bool
    prompt_logprobs: bool


def read_options(
    settings: GenerateKeywords,
) -> tuple[SamplingParams, TextOptions, Sequence[int] | None]:
    """The dataclasses that keyword arguments stand for, and a list of seeds if one was given.

    Raises:
      UsageError: a value is out of range.
      TypeError: a name is unknown.
    """
    given: dict[str, Any] = dict(settings)
    seed = given.get("seed")
    seeds = given.pop("seed") if isinstance(seed, Sequence) and not isinstance(seed, str) else None
    names = {field.name for field in fields(TextOptions)}
    options = TextOptions(**{name: given.pop(name) for name in names & given.keys()})
    params = SamplingParams(**given)
    check_new_tokens(params, options)
    return params, options, seeds


def check_new_tokens(params: SamplingParams, options: TextOptions) -> None:
    """Raises UsageError for a request that chooses no token and scores none: it would never end."""
    if params.max_new_tokens == 0 and not options.prompt_logprobs:
        raise UsageError(
            "max_new_tokens is out of range",
            key="max_new_tokens",
            expected="an integer, 1 or more; 0 only with prompt_logprobs",
            found=0,
        )


def takes_settings(method: _F) -> _F:
    """A decorator that replaces `**settings` by the keywords, and documents them."""
    own = inspect.signature(method)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    signature = own.replace(parameters=[*parameters, *keywords().values()])

    @functools.wraps(method)
    def call(*args: object, **given: object) -> object:
        try:
            signature.bind(*args, **given)
        except TypeError as error:
            raise TypeError(f"{method.__name__}() {error}") from None
        return method(*args, **given)

    call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    docs = inspect.cleandoc(method.__doc__ or "")
    lines = [
        textwrap.fill(
            f"{', '.join(names)}: {text}", 96, initial_indent="  ", subsequent_indent="    "
        )
        for names, text in _entries().items()
    ]
    call.__doc__ = docs.replace("{settings}", "\n".join(lines).lstrip())
    return call  # pyright: ignore[reportReturnType]


def keywords() -> dict[str, inspect.Parameter]:
    """Name → the keyword argument of `Model.generate`, with its type and default."""
    return {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for cls in _CLASSES
        for hints in [get_type_hints(cls)]
        for name, parameter in inspect.signature(cls).parameters.items()
    }


def descriptions() -> dict[str, str]:
    """Name → what the argument means. Where names share a description, each has it."""
    return {name: text for names, text in _entries().items() for name in names}


def _entries() -> dict[tuple[str, ...], str]:
    """Names that share a description → it, from the docstrings of both classes."""
    entries: dict[tuple[str, ...], str] = {}
    for cls in _CLASSES:
        docs = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        docs = docs.partition("\n\n")[0]
        for names, text in re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", docs, re.MULTILINE):
            entries[tuple(names.split(", "))] = " ".join(text.split())
    return entries
