"""Which TPUs a model fits: its parameters on each device, and what they leave for the KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from mtj_loader.dtypes import parameter_dtype
from mtj_loader.models import parameters, usable_shards
from mtj_loader.planning.compiled_fit import CompiledFit
from mtj_loader.planning.plan_data import PlanData

_GIB = 1 << 30
# The share of a device's HBM that parameters and cache can use. XLA reserves 0.52 of 8 GiB on v2
# and 1.25 of 32 GiB on v4 (from its out-of-memory messages); activations take the rest.
_USABLE = 0.92
_MIN_TOKENS = 2048  # one context of GPT-J and NeoX; with less cache a model is not usable


@dataclass(frozen=True)
class Slice:
    """A Cloud TPU slice as JAX sees it: a number of devices, and the HBM of each in bytes."""

    name: str
    devices: int
    hbm_bytes: int


# HBM as Google publishes it, in docs.cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p and v6e. On v2
# and v3 each of a chip's two cores is a device and has half of the chip's memory; from v4 on a chip
# is one device. The names count cores (v2, v3, v4, v5p) or chips (v5e, v6e).
SLICES = (
    Slice("v2-8", 8, 8 * _GIB),
    Slice("v3-8", 8, 16 * _GIB),
    Slice("v4-8", 4, 32 * _GIB),
    Slice("v5e-1", 1, 16 * _GIB),
    Slice("v5e-4", 4, 16 * _GIB),
    Slice("v5e-8", 8, 16 * _GIB),
    Slice("v5p-8", 4, 95 * _GIB),
    Slice("v6e-1", 1, 32 * _GIB),
    Slice("v6e-4", 4, 32 * _GIB),
    Slice("v6e-8", 8, 32 * _GIB),
)


@dataclass(frozen=True)
class Fit:
    """A model on a slice, split into as many shards as both allow.

    Attributes:
      slice: the devices.
      dp, mp: the mesh: replicas, and shards of each.
      device_bytes: parameters on each device.
      free_bytes: usable HBM of a device minus `device_bytes`; negative if it does not fit.
      cache_tokens: tokens of KV cache that fit into it, over all sequences of one replica.
      min_tokens: the tokens that a usable model needs.
      compiled: what the TPU compiler says; None for an estimate.
    """

    slice: Slice
    dp: int
    mp: int
    device_bytes: int
    free_bytes: int
    cache_tokens: int
    min_tokens: int
    compiled: CompiledFit | None = None

    @property
    def fits(self) -> bool:
        """Whether the model can be loaded and used there."""
        return self.cache_tokens >= self.min_tokens if self.compiled is None else self.compiled.fits

    @property
    def basis(self) -> str:
        """What `fits` is based on: "estimate", or "compiled"."""
        return "estimate" if self.compiled is None else "compiled"

    def to_dict(self) -> dict[str, object]:
        """The fit as JSON types; docs/json.md describes them."""
        apart = ("slice", "compiled")
        mine = {name: value for name, value in vars(self).items() if name not in apart}
        return {**asdict(self.slice), **mine, "fits": self.fits, "basis": self.basis}


def fits(plan: PlanData, compiled: Sequence[CompiledFit] = ()) -> list[Fit]:
    """How the plan's model fits on each of SLICES, with the plan's dtype and options.

    Args:
      plan: of the model.
      compiled: slices that the TPU compiler was asked about, with its answer.
    """
    answers = {fit.name: fit for fit in compiled if fit.failure is None}
    return [replace(_fit(plan, each), compiled=answers.get(each.name)) for each in SLICES]


def _fit(plan: PlanData, slice_: Slice) -> Fit:
    shards = usable_shards(plan.config, slice_.devices)[-1]
    held = device_bytes(plan, shards)
    free = int(_USABLE * slice_.hbm_bytes) - held
    return Fit(
        slice_,
        dp=slice_.devices // shards,
        mp=shards,
        device_bytes=held,
        free_bytes=free,
        cache_tokens=max(0, free) // cache_bytes_per_token(plan, shards),
        min_tokens=min(_MIN_TOKENS, plan.config.max_positions),
    )


def device_bytes(plan: PlanData, shards: int) -> int:
    """Bytes of parameters on each device if the plan's model had this many shards."""
    transposed = plan.options.transposed_linear
    specs = parameters(plan.config, shards, transposed)
    elements = sum(math.prod(spec.shard_shape(shards)) for spec in specs)
    return elements * parameter_dtype(plan.options.dtype).itemsize


def cache_bytes_per_token(plan: PlanData, shards: int) -> int:
    """Bytes of KV cache per token on each device of its replica."""
    return plan.config.cache_bytes_per_token(shards, parameter_dtype(plan.options.dtype))
