"""Asks the TPU compiler about a plan's model; the compiler runs in child processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from mtj_loader.errors import MachineError, UsageError
from mtj_loader.models import usable_shards
from mtj_loader.planning.compiled_fit import CompiledFit
from mtj_loader.planning.plan_data import PlanData
from mtj_loader.planning.tpu_targets import find_target

DEFAULT_CONTEXT = 2048  # of GPT-J and NeoX; less where the model's is shorter
LIMIT_SECONDS = 3600.0  # for one slice; a model of 20B parameters takes minutes

# Tells libtpu that there is no TPU here. Without the last one, only one process of a machine can
# load it.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_ENVIRONMENT = LIBTPU_ENVIRONMENT | {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # the time to compile is reported
}
_CHILD = (sys.executable, "-m", "mtj_loader.tpu_compiler")


@dataclass(frozen=True)
class Request:
    """What a child process is asked.

    Attributes:
      name: of the slice.
      config: config.json, normalized.
      dtype, transposed_linear, expert_parallel: as in LoadOptions.
      slots: sequences at a time.
      context: tokens that each slot has room for.
      search: also find the longest context and the most slots that fit.
    """

    name: str
    config: dict[str, Any]
    dtype: str
    transposed_linear: bool
    expert_parallel: bool
    slots: int
    context: int
    search: bool


def compile_for(
    plan: PlanData,
    names: str | Sequence[str],
    *,
    slots: int = 1,
    context: int | None = None,
    search: bool = True,
    limit_seconds: float = LIMIT_SECONDS,
) -> tuple[CompiledFit, ...]:
    """Compiles the programs of a plan's model for Cloud TPU slices, one after another.

    Args:
      plan: its model, dtype and options count; its mesh does not.
      names: slices, such as "v5e-8" or ["v3-8", "v5e-8"].
      slots: sequences at a time.
      context: tokens that each slot has room for; by default 2,048, or the model's context.
      search: also find the longest context and the most slots that fit.
      limit_seconds: for one slice; the compiler is ended then.

    Raises:
      UsageError: there is no such slice, or slots or context are out of range.
      MachineError: libtpu is not installed.
    """
    names = [names] if isinstance(names, str) else list(names)
    targets = [find_target(name) for name in names]
    longest = plan.config.max_positions
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    _check(slots, context, longest)
    check_libtpu()
    requests = [
        Request(
            target.slice.name,
            dict(plan.hf_config),
            plan.options.dtype,
            plan.options.transposed_linear,
            plan.options.expert_parallel,
            slots,
            context,
            search,
        )
        for target in targets
    ]
    return tuple(_ask(plan, request, limit_seconds) for request in requests)


def check_libtpu() -> None:
    """Raises MachineError if the TPU compiler is not installed."""
    if find_spec("libtpu") is None:
        hint = "pip install 'mtj-loader[tpu]'"
        raise MachineError("libtpu, the TPU compiler, is not installed", hint=hint)


def _check(slots: int, context: int, longest: int) -> None:
    """Raises UsageError if slots or context are out of range."""
    if slots < 1:
        raise UsageError("a model needs a slot", key="slots", expected="at least 1", found=slots)
    if not 1 <= context <= longest:
        what = "the model does not have this context"
        raise UsageError(what, key="context", expected=f"1 to {longest:,} tokens", found=context)


def _ask(plan: PlanData, request: Request, limit_seconds: float) -> CompiledFit:
    """Runs one child process and reads its answer."""
    devices = find_target(request.name).slice.devices
    mp = usable_shards(plan.config, devices)[-1]
    failed = CompiledFit(request.name, devices // mp, mp, request.slots, request.context)
    try:
        child = subprocess.run(
            _CHILD,
            input=json.dumps(asdict(request)),
            env={**os.environ, **_ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return replace(failed, failure=f"the compiler took more than {limit_seconds:g} seconds")
    if child.returncode:
        return replace(failed, failure=_describe_end(child.returncode, child.stderr))
    return CompiledFit.from_dict(json.loads(child.stdout))


def _describe_end(code: int, stderr: str) -> str:
    """Why a child gave no answer."""
    how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f"the compiler ended with {how}: {lines[-1] if lines else 'no message'}"
