"""`mtj-loader generate`: loads, and continues prompts."""

from __future__ import annotations

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
from mtj_loader.cli.output import note, print_json
from mtj_loader.cli.shared_options import AsJson, Machine, MeshOption
from mtj_loader.cli.start_up import StartUp
from mtj_loader.errors import UsageError
from mtj_loader.options import LoadOptions, Source

if TYPE_CHECKING:
    from mtj_loader import Model

_PROMPTS = "What is continued"
_SAMPLING = "How tokens are chosen"

_SECONDS = ("plan", "load", "compile", "overlap", "first_token")  # what there is to wait for

Prompt = str | list[int]


@dataclass(frozen=True)
class Prompts:
    """What to continue, each option as often as wanted."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text. Repeatable, as the next two.", rich_help_panel=_PROMPTS),
    ] = None
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A file whose whole content is one prompt.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None
    ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'12 7 …'", help="Token ids; token ids come back.", rich_help_panel=_PROMPTS
        ),
    ] = None

    def read(self) -> list[Prompt]:
        """All of them.

        Raises:
          UsageError: there is none, a file is no text, or ids are no numbers.
        """
        given: list[Prompt] = [*(self.prompt or ()), *map(_read_file, self.prompt_file or ())]
        given += map(_read_ids, self.ids or ())
        if not given:
            raise UsageError(
                "there is no prompt", hint="--prompt, --prompt-file or --ids gives one"
            )
        return given


@dataclass(frozen=True)
class Sampling:
    """The arguments of `Model.generate`."""

    max_new_tokens: Annotated[
        int, typer.Option(help="The most tokens to make.", rich_help_panel=_SAMPLING)
    ] = 64
    temperature: Annotated[
        float,
        typer.Option(help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING),
    ] = 0.8
    top_k: Annotated[
        int,
        typer.Option(
            help="Choose among this many of the likeliest; 0: all.", rich_help_panel=_SAMPLING
        ),
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            help="Choose among the likeliest that have this probability together.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text. Repeatable.", rich_help_panel=_SAMPLING),
    ] = None
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same text.", rich_help_panel=_SAMPLING)
    ] = 0

    def numbers(self) -> dict[str, Any]:
        """All but the stop strings, as fields of SamplingParams."""
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
    """Continue a prompt; the continuation is printed as it is made.

    Several prompts run together, and are printed one after another at the end.

    Example: [bold]mtj-loader generate EleutherAI/pythia-70m --prompt "Once upon a time"[/bold]
    """
    given = prompts.read()
    run = start_up.options_for(given, sampling.numbers())
    run |= cluster.join(machine)
    _agree(given, sampling, cluster)
    model = load_model(source, options, mesh, machine, run)
    note(describe(model))
    with cluster.connect() as hosts, hosts.phase("generate"):
        _print_continued(model, given, sampling, as_json=as_json)
    note(f"first token after {model.report.seconds['first_token']:.2f} s")


def _agree(given: list[Prompt], sampling: Sampling, cluster: Cluster) -> None:
    """Makes sure that all hosts continue the same prompts, before they load for nothing.

    Raises:
      HostError: one differs.
    """
    from mtj_loader.distributed.agreement import check_same_generation  # noqa: PLC0415 -- brings JAX

    with cluster.connect() as hosts:
        check_same_generation(hosts, given, asdict(sampling))


def _print_continued(
    model: Model, given: list[Prompt], sampling: Sampling, *, as_json: bool
) -> None:
    if as_json:
        print_json(to_dict(model, given, sampling))
    elif len(given) == 1:
        _print_stream(given[0], model.stream(given[0], **asdict(sampling)))
    else:
        _print_all(given, _generate(model, given, sampling))


def to_dict(model: Model, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, object]:
    """The continuations as JSON types; docs/json.md describes every key."""
    made = zip(prompts, _generate(model, prompts, sampling), strict=True)
    return {
        "location": model.plan.checkpoint.location,
        "model_type": model.plan.model_type,
        "sampling": asdict(sampling),
        "completions": [{"prompt": prompt, "completion": text} for prompt, text in made],
        "seconds": {key: model.report.seconds[key] for key in _SECONDS},
    }


def _generate(model: Model, prompts: Sequence[Prompt], sampling: Sampling) -> list[Prompt]:
    made: Any = model.generate(list(prompts), **asdict(sampling))  # a list for a list
    return made


def _print_stream(prompt: Prompt, pieces: Iterator[str] | Iterator[list[int]]) -> None:
    """A person sees the prompt too, in front of what continues it; a pipe gets what is new."""
    if sys.stdout.isatty():
        print(_shown(prompt), end=" " if isinstance(prompt, list) else "")
    for piece in pieces:
        print(_shown(piece), end=" " if isinstance(piece, list) else "", flush=True)
    print()


def _print_all(prompts: Sequence[Prompt], made: Sequence[Prompt]) -> None:
    for i, (prompt, text) in enumerate(zip(prompts, made, strict=True), start=1):
        print(f"[{i}] {_shown(prompt)}{' ' if isinstance(prompt, list) else ''}{_shown(text)}\n")


def _shown(piece: Prompt) -> str:
    return piece if isinstance(piece, str) else " ".join(map(str, piece))


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read the prompt", file=path, found=error) from error


def _read_ids(text: str) -> list[int]:
    parts = re.split(r"[\s,]+", text.strip())
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise UsageError("cannot read token ids", expected="like '12 7 300'", found=repr(text))
    return [int(part) for part in parts]
