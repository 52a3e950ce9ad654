"""Cloud TPU slices to compile for: their topology for libtpu, and the speed of a device."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError
from mtj_loader.planning.tpu_fit import SLICES, Slice

_GIB = 1 << 30


@dataclass(frozen=True)
class Target:
    """A slice to compile for.

    Attributes:
      slice: its name and devices.
      topology: libtpu's name for the shape of the slice.
      host_bounds: the chips of one host in each direction.
      available_bytes: HBM of a device that programs can use, as libtpu says in its messages.
      bandwidth: of a device's HBM, bytes per second.
      hertz: clock rate of a core.
      settings: more settings of the topology.
    """

    slice: Slice
    topology: str
    host_bounds: tuple[int, int, int]
    available_bytes: int
    bandwidth: float
    hertz: float
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Generation:
    """The attributes of `Target` that all slices of one generation share."""

    available_bytes: int
    bandwidth: float
    hertz: float
    settings: dict[str, str] = field(default_factory=dict)


# Bandwidths are Google's, from docs.cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p and v6e: 700,
# 900, 1,200, 819, 2,765 and 1,638 GB/s for a chip, of which a device of v2 and v3 is a half.
# Clock rates: 700 and 940 MHz of v2 and v3 (Norrie et al., 2021, doi:10.1109/MM.2021.3058217),
# 1,050 MHz of v4 (Jouppi et al., 2023, arXiv:2304.01433); later ones are not published, but follow
# from the peak of the matrix units (197 TFLOP/s = 4 units x 128 x 128 x 2 x 1.5 GHz for v5e).
# "megacore" makes the two cores of a v4 chip one device, as JAX does on the hardware.
_GENERATIONS = {
    "v2": _Generation(7 * _GIB + 496 * 2**20, 350e9, 0.70e9),
    "v3": _Generation(15 * _GIB + 496 * 2**20, 450e9, 0.94e9),
    "v4": _Generation(30 * _GIB + 768 * 2**20, 1200e9, 1.05e9, {"chip_config_name": "megacore"}),
    "v5e": _Generation(15 * _GIB + 768 * 2**20, 819e9, 1.5e9),
    "v5p": _Generation(95 * _GIB + 757 * 2**20, 2765e9, 1.75e9),
    "v6e": _Generation(31 * _GIB + 256 * 2**20, 1638e9, 1.75e9),
}
_TOPOLOGIES = {
    "v2-8": ("2x2", (2, 2, 1)),
    "v3-8": ("2x2", (2, 2, 1)),
    "v4-8": ("2x2x1", (2, 2, 1)),
    "v5e-1": ("1x1", (1, 1, 1)),
    "v5e-4": ("2x2", (2, 2, 1)),
    "v5e-8": ("2x4", (2, 4, 1)),
    "v5p-8": ("2x2x1", (2, 2, 1)),
    "v6e-1": ("1x1", (1, 1, 1)),
    "v6e-4": ("2x2", (2, 2, 1)),
    "v6e-8": ("2x4", (2, 4, 1)),
}


def find_target(name: str) -> Target:
    """The slice of a name such as "v5e-8".

    Raises:
      UsageError: there is no such slice; the message lists those that there are.
    """
    if name not in TARGETS:
        raise UsageError(
            "not a TPU slice to compile for",
            key="compile_for",
            expected="one of " + ", ".join(TARGETS),
            found=show_value(name),
        )
    return TARGETS[name]


def _target(slice_: Slice) -> Target:
    generation, (shape, bounds) = slice_.name.partition("-")[0], _TOPOLOGIES[slice_.name]
    shared = _GENERATIONS[generation]
    return Target(slice_, f"{generation}:{shape}", bounds, **vars(shared))


TARGETS = {slice_.name: _target(slice_) for slice_ in SLICES}
