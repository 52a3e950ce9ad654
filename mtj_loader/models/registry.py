"""Finding a family: one small module each, named by the `model_type` of config.json.

A family's module says what its config means and builds the model from Haiku modules; `Family`
below is all that the rest of the package uses of it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol, cast

import haiku as hk
import numpy as np

from mtj_loader.errors import ConfigError
from mtj_loader.formats.typed_reader import shorten
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.decoder import CausalTransformer
from mtj_loader.models.parameter_table import ParameterBuilder
from mtj_loader.parameters import ParamSpec

# model_type, which is the module's name here, and the name of the family in weight maps
# (`mtj_compat`). A closed list: no other module is ever imported, whatever a config says.
FAMILIES = {
    "gpt_neox": "neox",
    "gptj": "j",
    "gpt_neo": "neo",
    "opt": "opt",
    "xglm": "fairseq_lm",
    "bloom": "bloom",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "mpt": "mpt",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
}

_HINTS = {"gemma3": "of multimodal Gemma 3, only checkpoints of the text model are supported"}


class Family(Protocol):
    """What each `models/families/<model_type>.py` defines."""

    Config: type[ModelConfig]

    def make_model(self, config: Any, params: ParameterBuilder) -> CausalTransformer:  # noqa: ANN401
        """Creates the Haiku modules, inside hk.transform; `config` is a `Config`."""
        ...


def family(model_type: str, *, file: str | None = None) -> Family:
    """The module of a family, by the `model_type` of config.json.

    Args:
      model_type: its name.
      file: where the name was read, for messages.

    Raises:
      ConfigError: no such family; the known ones are named.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            "unknown model family",
            file=file,
            key="model_type",
            expected=f"one of {known}",
            found=shorten(model_type),
            hint=_HINTS.get(model_type),
        )
    return cast(Family, importlib.import_module(f"mtj_loader.models.families.{model_type}"))


@functools.lru_cache(maxsize=16)  # a plan needs one model at several shard counts
def parameters(config: ModelConfig, shards: int, transposed_linear: bool) -> tuple[ParamSpec, ...]:
    """Every parameter of a model with this config, over so many shards."""
    params = ParameterBuilder(
        config.axis_sizes(shards), shards, transposed_linear, np.dtype(np.float32)
    )
    make_model = family(config.model_type).make_model
    with hk.config.context(module_auto_repr=False):  # several times faster
        hk.transform(lambda: make_model(config, params)).init(None)  # creates it without running it
    return tuple(params.specs)
