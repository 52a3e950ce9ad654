"""A checkpoint in another dtype: the function behind `mtj_loader.convert`."""

from __future__ import annotations

from typing import Literal, get_args

from mtj_loader.conversion.convert_plan import PathLike, find_target, make_plan, open_source
from mtj_loader.conversion.convert_report import ConvertReport
from mtj_loader.conversion.execute import execute
from mtj_loader.conversion.output_folder import check_target
from mtj_loader.display import parse_bytes
from mtj_loader.errors import UsageError
from mtj_loader.options import Source

NewDType = Literal["float16", "bfloat16", "float32"]
OnOverflow = Literal["refuse", "clamp"]


def convert(
    src: PathLike,
    out: PathLike | None = None,
    *,
    dtype: NewDType,
    on_overflow: OnOverflow = "refuse",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    progress: bool = True,
) -> ConvertReport:
    """Writes a checkpoint of any family anew, its floats in another dtype.

    Each number is rounded once, to nearest even; integers and booleans stay as they are. The
    config, with its dtype changed, the tokenizer and all other small files come along. The output
    appears whole or not at all.

    Args:
      src: a folder, a .safetensors file, a URL such as gs://bucket/model, or a Hugging Face id.
      out: the folder to make; by default `<name>-<dtype>` beside the source, and in the working
        folder for what is not on this machine.
      dtype: of the new floats.
      on_overflow: "refuse" makes numbers that are too large for the dtype an error, "clamp" makes
        them the largest that it has.
      allow_nonfinite: convert NaN and infinity all the same.
      overwrite: replace a checkpoint that is there already.
      max_shard_size: the most bytes of tensors in a file, such as "5GB"; a larger tensor gets a
        file of its own.
      revision: of a Hugging Face id: a branch, a tag or a commit.
      token: for private models; by default the one that huggingface_hub finds.
      cache_dir: where downloads are kept; by default huggingface_hub's cache.
      local_files_only: take what the cache has, and ask no server.
      stream: read a Hugging Face repository by ranges and keep no file of it; docs/storage.md.
      progress: show a progress bar where a person can see it.

    Raises:
      UsageError: an option, or a target that may not be written.
      CheckpointError: the source is at fault; NonFiniteError for NaN, infinity and overflow.
      MachineError: the disk is full or failed, or the network did.
    """
    _check_choice("dtype", dtype, get_args(NewDType))
    _check_choice("on_overflow", on_overflow, get_args(OnOverflow))
    max_shard_bytes = parse_bytes(max_shard_size)
    target = find_target(src, out, dtype)
    check_target(target, overwrite=overwrite)
    source = open_source(Source(src, revision, token, cache_dir, local_files_only, stream))
    plan = make_plan(source, target, dtype, max_shard_bytes)
    return execute(
        plan,
        clamp=on_overflow == "clamp",
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        progress=progress,
    )


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(choices)
        raise UsageError("unknown option", key=key, expected=expected, found=repr(value))
