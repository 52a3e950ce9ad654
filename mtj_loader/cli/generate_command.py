"""`mtj-loader generate`: loads a model and continues prompts."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtj_loader.cli.cluster import Cluster
from mtj_loader.cli.command import command
from mtj_loader.cli.load_command import describe, load_model
from mtj_loader.cli.output import note, print_generated, print_json
from mtj_loader.cli.setting_options import SettingOptions, read_ids, read_text_file
from mtj_loader.cli.shared_options import (
    AsJson,
    ContextLengthOption,
    Machine,
    MeshOption,
    SlotsOption,
)
from mtj_loader.cli.start_up import PendingPrompts, StartUp
from mtj_loader.engine.generate_options import GenerateKeywords, read_options
from mtj_loader.errors import UsageError
from mtj_loader.options import LoadOptions, Source

if TYPE_CHECKING:
    from mtj_loader import Model
    from mtj_loader.generation.prompts import Prompt as TokenizedPrompt
    from mtj_loader.generation.row_output import Completion
    from mtj_loader.generation.tokenizer import Tokenizer
    from mtj_loader.sampling.result import Chosen

_prompt_option = functools.partial(typer.Option, rich_help_panel="Prompts")

_SECONDS = ("plan", "load", "compile", "overlap", "first_token")  # the stages of the start

Prompt = str | list[int]


@dataclass(frozen=True)
class Prompts:
    """The prompts; each option may be repeated, and they may be combined."""

    prompt: Annotated[
        list[str] | None, _prompt_option(help="A text to continue. May be repeated.")
    ] = None
    prompt_file: Annotated[
        list[Path] | None,
        _prompt_option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A file or pipe that contains one prompt. May be repeated.",
        ),
    ] = None
    ids: Annotated[
        list[str] | None,
        _prompt_option(
            metavar="'12 7 …'",
            help="A prompt as token ids; the output is token ids too. May be repeated.",
        ),
    ] = None

    def read(self) -> list[Prompt]:
        """All prompts: texts, then files, then token ids.

        Raises:
          UsageError: there is no prompt, a file is not text or too large, or ids are not numbers.
        """
        given: list[Prompt] = list(self.prompt or ())
        given += [read_text_file(path, "the prompt") for path in self.prompt_file or ()]
        given += map(read_ids, self.ids or ())
        if not given:
            raise UsageError("no prompt", hint="use --prompt, --prompt-file or --ids")
        return given


@command
def generate(
    *,
    source: Source,
    prompts: Prompts,
    settings: SettingOptions,
    slots: SlotsOption = None,
    context_length: ContextLengthOption = None,
    mesh: MeshOption = None,
    options: LoadOptions,
    machine: Machine,
    start_up: StartUp,
    cluster: Cluster,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt and print the text while it is generated.

    Several prompts run at the same time; their texts are printed at the end, one after another.

    Example: [bold]mtj-loader generate EleutherAI/pythia-70m --prompt "Once upon a time"[/bold]
    """
    inputs, keywords = prompts.read(), settings.keywords()
    params, text_options, _ = read_options(keywords)
    if not as_json:
        _refuse_logprobs(params.logprobs is not None, text_options.prompt_logprobs)
    pending = PendingPrompts(inputs, params.max_new_tokens, text_options.n)
    run = start_up.options_for(pending) | {"slots": slots, "context_length": context_length}
    run |= cluster.join(machine)
    _check_agreement(inputs, keywords, cluster)
    model = load_model(source, _choose_dtype(options), mesh, machine, run)
    note(describe(model))
    with cluster.connect() as hosts, hosts.phase("generate"):
        if as_json:
            print_json(to_dict(model, inputs, pending.tokenized, keywords))
        elif len(inputs) * text_options.n == 1:
            _print_stream(inputs[0], model, pending.tokenized[0], keywords)
        else:
            _print_all(inputs, model, pending.tokenized, keywords)
    note(f"first token after {model.report.seconds['first_token']:.2f} s")


def _choose_dtype(options: LoadOptions) -> LoadOptions:
    """The options with the best dtype for these devices, unless one was given."""
    from mtj_loader.api import options_for_generation  # noqa: PLC0415 -- imports JAX

    chosen = options_for_generation(options)
    if chosen != options:
        why = "this CPU has no bfloat16 arithmetic"
        note(f"note: the dtype is float32, as {why}; --dtype bfloat16 takes half the memory")
    return chosen


def _refuse_logprobs(logprobs: bool, prompt_logprobs: bool) -> None:
    """Raises UsageError if log-probabilities were asked for: texts have no place for them."""
    flags = {"--logprobs": logprobs, "--prompt-logprobs": prompt_logprobs}
    if given := [flag for flag, value in flags.items() if value]:
        raise UsageError(f"{given[0]} needs --json", key=given[0])


def _check_agreement(inputs: list[Prompt], keywords: GenerateKeywords, cluster: Cluster) -> None:
    """Checks before the load that all hosts were given the same prompts and settings.

    Raises:
      HostError: a host has different ones.
    """
    from mtj_loader.distributed.agreement import check_same_generation  # noqa: PLC0415 -- imports JAX

    with cluster.connect() as hosts:
        check_same_generation(hosts, inputs, keywords)


def to_dict(
    model: Model,
    prompts: Sequence[Prompt],
    tokenized: Sequence[TokenizedPrompt],
    keywords: GenerateKeywords,
) -> dict[str, object]:
    """Generates; returns the completions as JSON types; docs/json.md describes every key."""
    params, options, _ = read_options(keywords)
    completions = model.start(list(tokenized), **keywords).complete()
    found = [
        _completion_to_dict(
            model, prompts[i // options.n], tokenized[i // options.n], one, keywords
        )
        for i, one in enumerate(completions)
    ]
    return {
        "location": model.plan.checkpoint.location,
        "model_type": model.plan.model_type,
        "dtype": model.forward.dtype.name,
        "sampling": asdict(params) | asdict(options),
        "completions": found,
        "seconds": {key: model.report.seconds[key] for key in _SECONDS},
    }


def _completion_to_dict(
    model: Model,
    prompt: Prompt,
    tokenized: TokenizedPrompt,
    completion: Completion,
    keywords: GenerateKeywords,
) -> dict[str, object]:
    from mtj_loader.sampling.result import Chosen  # noqa: PLC0415 -- imports JAX

    text: Any = completion.text or "" if tokenized.is_text else list(completion.ids)
    top = keywords.get("logprobs")
    shown = functools.partial(_token_to_dict, model.tokenizer, top or 0)
    logprobs = None if top is None else [shown(chosen) for chosen in completion.choices]
    prompt_logprobs = None
    if keywords.get("prompt_logprobs"):
        first = Chosen(tokenized.ids[0])  # nothing comes before it
        prompt_logprobs = [shown(chosen) for chosen in (first, *completion.prompt_choices)]
    return {
        "prompt": prompt,
        "completion": prompt + text if keywords.get("echo") else text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.ids),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }


def _token_to_dict(tokenizer: Tokenizer | None, top: int, chosen: Chosen) -> dict[str, object]:
    """A token with its log-probability, and those of the `top` most likely tokens in its place."""
    from mtj_loader.sampling.breakers import token_texts  # noqa: PLC0415

    found = [(chosen.token, chosen.logprob), *chosen.top[:top]]
    ids = [token for token, _ in found]
    texts = [None] * len(ids) if tokenizer is None else token_texts(tokenizer.backend, ids)
    first, *others = (
        {"id": token, "text": text, "logprob": value if math.isfinite(value) else None}
        for (token, value), text in zip(found, texts, strict=True)
    )
    return {**first, "top": others}


def _print_stream(
    prompt: Prompt, model: Model, tokenized: TokenizedPrompt, keywords: GenerateKeywords
) -> None:
    """Prints pieces as they come; a terminal shows the prompt before them, a pipe does not."""
    end = " " if isinstance(prompt, list) else ""
    if sys.stdout.isatty() and not keywords.get("echo"):
        print_generated(_to_text(prompt), end=end)
    for piece in model.stream(tokenized, **keywords):
        print_generated(_to_text(piece), end=end)
    print_generated("\n")


def _print_all(
    prompts: Sequence[Prompt],
    model: Model,
    tokenized: Sequence[TokenizedPrompt],
    keywords: GenerateKeywords,
) -> None:
    """Prints all completions, each after its prompt."""
    completions: Any = model.generate(list(tokenized), **keywords | {"echo": False})
    repeated = [prompt for prompt in prompts for _ in range(keywords.get("n", 1))]
    for i, (prompt, text) in enumerate(zip(repeated, completions, strict=True), start=1):
        space = " " if isinstance(prompt, list) else ""
        print_generated(f"[{i}] {_to_text(prompt)}{space}{_to_text(text)}\n\n")


def _to_text(piece: Prompt) -> str:
    return piece if isinstance(piece, str) else " ".join(map(str, piece))
