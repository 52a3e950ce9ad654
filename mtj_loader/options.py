"""The options of a load, each defined and documented once.

`mtj_loader.plan`, `mtj_loader.load` and the command line take their names, defaults and
descriptions from the two dataclasses here.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, TypedDict, TypeVar, get_type_hints

from mtj_loader.display import parse_bytes
from mtj_loader.dtypes import DTypeName, parameter_dtype
from mtj_loader.errors import UsageError

PathLike = str | os.PathLike[str]
AdapterLike = PathLike | Sequence[tuple[PathLike, float]]

# User names and queries of URLs, which can be credentials. In abfs://, a container precedes the @.
_URL_SECRETS = re.compile(r"(?<=://)(?<!abfs://)(?<!abfss://)[^/@\s'\"]*@|\?[^\s'\"]*")

MIN_HOST_MEMORY_BYTES = 64 << 20  # with less, reads and pending copies to devices do not overlap


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is and how to access it."""

    path: Annotated[
        PathLike,
        "A folder, a .safetensors file, a URL (s3://, gs://, az://, https://), or a Hugging Face "
        "id.",
    ]
    revision: Annotated[str | None, "Branch, tag or commit of the Hugging Face repository."] = None
    token: Annotated[
        str | None, "For private repositories; by default the token stored on this machine."
    ] = None
    cache_dir: Annotated[
        PathLike | None, "Where downloads are kept; by default huggingface_hub's cache."
    ] = None
    local_files_only: Annotated[bool, "Use what is in the cache and never the network."] = False
    stream: Annotated[
        bool,
        "Read a Hugging Face repository in ranges and keep no files, as with URLs; see "
        "docs/storage.md.",
    ] = False

    def __repr__(self) -> str:
        return _show_options(self)

    def check_path(self) -> None:
        """Raises UsageError if `path` is not a path at all."""
        if not isinstance(self.path, str | os.PathLike) or not os.fspath(self.path):
            raise UsageError("not a checkpoint's path", key="path", found=repr(self.path))


@dataclass(frozen=True)
class LoadOptions:
    """In which form a checkpoint is loaded, and what is checked."""

    dtype: Annotated[
        DTypeName,
        "Dtype of the parameters; auto is bfloat16, and float32 for `mtj-loader generate` on a CPU "
        "without bfloat16 arithmetic.",
    ] = "auto"
    transposed_linear: Annotated[
        bool, "Keep linear weights in torch's order, [out, in]; the fastest to load."
    ] = False
    expert_parallel: Annotated[
        bool, "Distribute whole experts over the shards instead of splitting each expert."
    ] = False
    map: Annotated[PathLike | None, "A weight map to use instead of the family's own."] = None
    adapter: Annotated[
        AdapterLike | None,
        "A LoRA adapter's folder or URL, or several, each with a weight; merged while loading.",
    ] = None
    host_memory: Annotated[
        str | int, "Maximum memory in flight between files and devices, such as 1GiB."
    ] = "1GiB"
    check_finite: Annotated[bool, "Check all weights for NaN and infinity."] = False
    allow_unmapped: Annotated[
        bool, "Skip tensors that are not in the weight map, with a warning."
    ] = False
    allow_nonfinite: Annotated[bool, "Load NaN and infinity instead of refusing them."] = False
    ignore_settings: Annotated[
        Sequence[str],
        "Keys of config.json to leave out, on your own responsibility, if they are refused.",
    ] = ()

    def __repr__(self) -> str:
        return _show_options(self)

    @property
    def host_memory_bytes(self) -> int:
        """`host_memory` in bytes.

        Raises:
          UsageError: it is not a size, or it is too small.
        """
        size_bytes = parse_bytes(self.host_memory)
        if size_bytes < MIN_HOST_MEMORY_BYTES:
            found = f"{size_bytes:,} bytes"
            raise UsageError("host_memory is too small", expected="at least 64MiB", found=found)
        return size_bytes

    @property
    def adapters(self) -> list[tuple[PathLike, float]]:
        """The adapters with their weights; see `weighted`."""
        return weighted(self.adapter)

    def check(self) -> None:
        """Raises UsageError for a value that is malformed or out of range."""
        _ = self.host_memory_bytes
        parameter_dtype(self.dtype)
        keys = self.ignore_settings
        if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
            expected = 'a list of keys, such as ["sliding_window"]'
            raise UsageError(
                "not a list of keys", key="ignore_settings", expected=expected, found=repr(keys)
            )

    def to_dict(self) -> dict[str, object]:
        """What every parameter depends on, as JSON types; docs/json.md describes it."""
        return {
            "dtype": self.dtype,
            "transposed_linear": self.transposed_linear,
            "expert_parallel": self.expert_parallel,
            "host_memory_bytes": self.host_memory_bytes,
            "check_finite": self.check_finite,
            "allow_unmapped": self.allow_unmapped,
            "allow_nonfinite": self.allow_nonfinite,
            "ignore_settings": list(self.ignore_settings),
        }


def _show_options(options: Source | LoadOptions) -> str:
    """The options that differ from their defaults, as a call without credentials."""
    texts = [
        f"{field.name}={value!r}"
        for field in fields(options)
        if (value := getattr(options, field.name)) != field.default and field.name != "token"
    ]
    shown = ", ".join(_URL_SECRETS.sub("", text) if "://" in text else text for text in texts)
    return f"{type(options).__name__}({shown})"


def weighted(adapter: AdapterLike | None) -> list[tuple[PathLike, float]]:
    """Adapters with their weights; a single adapter has weight 1.

    Raises:
      UsageError: not a path or a list of (path, weight), or a weight is not finite.
    """
    if adapter is None:
        return []
    if isinstance(adapter, str | os.PathLike):
        return [(adapter, 1.0)]
    found: list[tuple[PathLike, float]] = []
    for item in adapter if isinstance(adapter, list | tuple) else [adapter]:
        match item:
            case (str() | os.PathLike() as folder, int() | float() as w) if math.isfinite(w):
                found.append((folder, float(w)))
            case _:
                expected = "a folder, or a list of (folder, weight)"
                raise UsageError(
                    "not an adapter", key="adapter", expected=expected, found=repr(item)
                )
    return found


# ---- the keyword arguments of `plan` and `load`


class SourceKeywords(TypedDict, total=False):
    """The fields of Source as keyword arguments, for type checkers."""

    revision: str | None
    token: str | None
    cache_dir: PathLike | None
    local_files_only: bool
    stream: bool


class Keywords(SourceKeywords, total=False):
    """The fields of Source and LoadOptions as keyword arguments, for type checkers."""

    dtype: DTypeName
    transposed_linear: bool
    expert_parallel: bool
    map: PathLike | None
    adapter: AdapterLike | None
    host_memory: str | int
    check_finite: bool
    allow_unmapped: bool
    allow_nonfinite: bool
    ignore_settings: Sequence[str]


def split_keywords(path: PathLike, keywords: Keywords) -> tuple[Source, LoadOptions]:
    """The source and the options that keyword arguments stand for."""
    given: Mapping[str, object] = keywords
    source, options = (
        {field.name: given[field.name] for field in fields(cls) if field.name in given}
        for cls in (Source, LoadOptions)
    )
    return Source(path, **source), LoadOptions(**options)  # pyright: ignore[reportArgumentType]


_F = TypeVar("_F", bound=Callable[..., object])


def takes_options(*groups: type[Source | LoadOptions]) -> Callable[[_F], _F]:
    """A decorator that replaces `**keywords` by the fields of the groups.

    The function's signature gets each keyword with its default, so that a misspelled one raises
    TypeError. In its docstring, `path: {path}` and `{options}` become the descriptions of these.
    """
    return functools.partial(_add_options, options=[*_option_parameters(groups)])


def _add_options(function: _F, options: Sequence[inspect.Parameter]) -> _F:
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    at = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    parameters[at:at] = options
    signature = own.replace(parameters=parameters)

    @functools.wraps(function)
    def call(*args: object, **keywords: object) -> object:
        try:
            signature.bind(*args, **keywords)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        return function(*args, **keywords)

    call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    docs = inspect.cleandoc(function.__doc__ or "").replace("path: {path}", _entries(["path"]))
    call.__doc__ = docs.replace("{options}", _entries(p.name for p in options))
    return call  # pyright: ignore[reportReturnType]


def _option_parameters(groups: Iterable[type]) -> Iterator[inspect.Parameter]:
    for cls in groups:
        types = get_type_hints(cls)
        for field in fields(cls):
            if field.default is not MISSING:  # all but the path
                kind = inspect.Parameter.KEYWORD_ONLY
                yield inspect.Parameter(
                    field.name, kind, default=field.default, annotation=types[field.name]
                )


def _entries(names: Iterable[str]) -> str:
    """Descriptions of options as entries of an `Args:` section, without the first indent."""
    texts = descriptions()
    entries = (
        textwrap.fill(
            f"{name}: {texts[name]}", 96, initial_indent=" " * 2, subsequent_indent=" " * 4
        )
        for name in names
    )
    return "\n".join(entries).lstrip()


def descriptions() -> dict[str, str]:
    """Option name → what it means, in a sentence."""
    hints = [get_type_hints(cls, include_extras=True) for cls in (Source, LoadOptions)]
    return {name: hint.__metadata__[0] for each in hints for name, hint in each.items()}
