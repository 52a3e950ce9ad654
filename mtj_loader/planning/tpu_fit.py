"""Which TPUs a model fits: its parameters on each device, and what they leave for the KV cache."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mtj_loader.dtypes import parameter_dtype
from mtj_loader.models import family, usable_shards

if TYPE_CHECKING:
    from mtj_loader.planning.load_plan import LoadPlan

_GIB = 1 << 30
# Of its HBM a device can use about this part. The rest is XLA's own (0.52 of 8 GiB on v2, 1.25 of
# 32 on v4, say its messages when memory runs out) and for the activations of a step.
_USABLE = 0.92
_MIN_TOKENS = 2048  # a model with less cache than one context of GPT-J's or NeoX's is of no use


@dataclass(frozen=True)
class Slice:
    """A slice of Cloud TPU as JAX sees it: so many devices with so many bytes of HBM each."""

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
    """A model on a slice, cut into as many shards as both allow.

    Attributes:
      slice: the devices.
      dp, mp: the mesh: replicas, and shards of each.
      device_bytes: parameters on each device.
      free_bytes: what they leave of the usable HBM of a device; negative if they are too large.
      cache_tokens: how many tokens of KV cache that holds, in all rows of one replica together.
      least_tokens: how many have to be there.
    """

    slice: Slice
    dp: int
    mp: int
    device_bytes: int
    free_bytes: int
    cache_tokens: int
    least_tokens: int

    @property
    def fits(self) -> bool:
        """Whether the model can be loaded and used there."""
        return self.cache_tokens >= self.least_tokens

    def to_dict(self) -> dict[str, object]:
        """The fit as JSON types; docs/json.md describes them."""
        mine = {name: value for name, value in vars(self).items() if name != "slice"}
        return {**asdict(self.slice), **mine, "fits": self.fits}


def fits(plan: LoadPlan) -> list[Fit]:
    """How the model of a plan would do on each of SLICES, with the plan's dtype and options."""
    return [_fit(plan, slice_) for slice_ in SLICES]


def _fit(plan: LoadPlan, slice_: Slice) -> Fit:
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
        least_tokens=min(_MIN_TOKENS, plan.config.max_positions),
    )


def device_bytes(plan: LoadPlan, shards: int) -> int:
    """Bytes of parameters on each device if the plan's model were cut into so many shards."""
    transposed = plan.options.transposed_linear
    specs = family(plan.model_type).parameters(plan.config, shards, transposed)
    elements = sum(math.prod(spec.shard_shape(shards)) for spec in specs)
    return elements * parameter_dtype(plan.options.dtype).itemsize


def cache_bytes_per_token(plan: LoadPlan, shards: int) -> int:
    """Bytes of KV cache that a token takes on each device of its replica.

    A key and a value of every head that a shard holds, in every layer (Pope et al., 2022,
    arXiv:2211.05102); fewer KV heads than shards are repeated.
    """
    config = plan.config
    heads = max(1, config.n_kv_heads // shards)
    itemsize = parameter_dtype(plan.options.dtype).itemsize
    return 2 * config.layers * heads * config.head_dim * itemsize
