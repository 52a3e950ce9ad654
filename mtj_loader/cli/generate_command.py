"""`mtj-loader generate`: loads a model and continues prompts."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtj_loader.cli.cluster import Cluster
from mtj_loader.cli.command import command
from mtj_loader.cli.load_command import describe, load_model
from mtj_loader.cli.output import note, print_generated, print_json
from mtj_loader.cli.shared_options import AsJson, Machine, MeshOption
from mtj_loader.cli.start_up import PendingPrompts, StartUp
from mtj_loader.errors import UsageError
from mtj_loader.options import LoadOptions, Source

if TYPE_CHECKING:
    from mtj_loader import Model
    from mtj_loader.generation.prompts import Prompt as TokenizedPrompt

_prompt_option = functools.partial(typer.Option, rich_help_panel="Prompts")
_sampling_option = functools.partial(typer.Option, rich_help_panel="Sampling")

_MAX_PROMPT_BYTES = 100_000_000  # several times the longest context

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
        given: list[Prompt] = [*(self.prompt or ()), *map(_read_file, self.prompt_file or ())]
        given += map(_read_ids, self.ids or ())
        if not given:
            raise UsageError("no prompt", hint="use --prompt, --prompt-file or --ids")
        return given


@dataclass(frozen=True)
class Sampling:
    """The arguments of `Model.generate`."""

    max_new_tokens: Annotated[
        int, _sampling_option(help="Maximum number of tokens to generate.")
    ] = 64
    temperature: Annotated[
        float, _sampling_option(help="0 always picks the most likely token.")
    ] = 0.8
    top_k: Annotated[
        int, _sampling_option(help="Sample from the K most likely tokens; 0 means all.")
    ] = 0
    top_p: Annotated[
        float,
        _sampling_option(
            help="Sample from the most likely tokens whose probabilities add up to this."
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None, _sampling_option(help="Stop before this text. May be repeated.")
    ] = None
    seed: Annotated[int, _sampling_option(help="The same seed gives the same text.")] = 0

    def numbers(self) -> dict[str, Any]:
        """The fields of SamplingParams: everything but the stop strings."""
        return {key: value for key, value in asdict(self).items() if key != "stop"}


@command
def generate(
    *,
    source: Source,
    prompts: Prompts,
    sampling: Sampling,
    mesh: MeshOption = None,
    options: LoadOptions,
    machine: Machine,
    start_up: StartUp,
    cluster: Cluster,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt and print the text while it is generated.

    Several prompts run as one batch; their texts are printed at the end, one after another.

    Example: [bold]mtj-loader generate EleutherAI/pythia-70m --prompt "Once upon a time"[/bold]
    """
    inputs = prompts.read()
    pending = PendingPrompts(inputs, sampling.numbers())
    run = start_up.options_for(pending)
    run |= cluster.join(machine)
    _check_agreement(inputs, sampling, cluster)
    model = load_model(source, options, mesh, machine, run)
    note(describe(model))
    with cluster.connect() as hosts, hosts.phase("generate"):
        _print_completions(model, inputs, pending.tokenized, sampling, as_json=as_json)
    note(f"first token after {model.report.seconds['first_token']:.2f} s")


def _check_agreement(inputs: list[Prompt], sampling: Sampling, cluster: Cluster) -> None:
    """Checks before the load that all hosts were given the same prompts and sampling options.

    Raises:
      HostError: a host has different ones.
    """
    from mtj_loader.distributed.agreement import check_same_generation  # noqa: PLC0415 -- imports JAX

    with cluster.connect() as hosts:
        check_same_generation(hosts, inputs, asdict(sampling))


def _print_completions(
    model: Model,
    inputs: list[Prompt],
    tokenized: list[TokenizedPrompt],
    sampling: Sampling,
    *,
    as_json: bool,
) -> None:
    if len(inputs) == 1 and not as_json:
        _print_stream(inputs[0], model.stream(tokenized[0], **asdict(sampling)))
        return
    texts: Any = model.generate(tokenized, **asdict(sampling))  # a list, as the argument is one
    if as_json:
        print_json(to_dict(model, inputs, texts, sampling))
    else:
        _print_all(inputs, texts)


def to_dict(
    model: Model, prompts: Sequence[Prompt], texts: Sequence[Prompt], sampling: Sampling
) -> dict[str, object]:
    """The completions as JSON types; docs/json.md describes every key."""
    completions = zip(prompts, texts, strict=True)
    return {
        "location": model.plan.checkpoint.location,
        "model_type": model.plan.model_type,
        "sampling": asdict(sampling),
        "completions": [{"prompt": prompt, "completion": text} for prompt, text in completions],
        "seconds": {key: model.report.seconds[key] for key in _SECONDS},
    }


def _print_stream(prompt: Prompt, pieces: Iterator[str] | Iterator[list[int]]) -> None:
    """Prints pieces as they come; a terminal shows the prompt before them, a pipe does not."""
    if sys.stdout.isatty():
        print_generated(_to_text(prompt), end=" " if isinstance(prompt, list) else "")
    for piece in pieces:
        print_generated(_to_text(piece), end=" " if isinstance(piece, list) else "")
    print_generated("\n")


def _print_all(prompts: Sequence[Prompt], completions: Sequence[Prompt]) -> None:
    for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True), start=1):
        space = " " if isinstance(prompt, list) else ""
        print_generated(f"[{i}] {_to_text(prompt)}{space}{_to_text(text)}\n\n")


def _to_text(piece: Prompt) -> str:
    return piece if isinstance(piece, str) else " ".join(map(str, piece))


def _read_file(path: Path) -> str:
    """Reads a prompt from a file or a pipe; every line end becomes a newline."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PROMPT_BYTES + 1)
        if len(data) > _MAX_PROMPT_BYTES:
            expected = f"at most {_MAX_PROMPT_BYTES:,} bytes"
            raise UsageError("the prompt is too large", file=path, expected=expected, found="more")
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        found = error if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError("cannot read the prompt", file=path, found=found) from error


def _read_ids(text: str) -> list[int]:
    parts = re.split(r"[\s,]+", text.strip())
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise UsageError(
            "cannot read token ids", expected="numbers, for example '12 7 300'", found=repr(text)
        )
    return [int(part) for part in parts]
