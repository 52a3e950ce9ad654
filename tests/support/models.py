"""Models for tests: a checkpoint folder on a mesh, without the loader."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

from mtj_loader.formats import hf_config
from mtj_loader.models import family
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.forward import Forward, Params
from tests.support.mtj_tree import Tree, neox_tree

DATA = Path(__file__).parents[1] / "data"
PARITY = DATA / "neox_parity"
GOLDENS = DATA / "goldens"


def make_mesh(dp: int, mp: int) -> Mesh:
    """The first dp·mp devices."""
    return Mesh(np.asarray(jax.devices()[: dp * mp]).reshape(dp, mp), ("dp", "mp"))


def read_config(config: Mapping[str, object]) -> ModelConfig:
    """Reads a GPT-NeoX config as the loader does."""
    normal = hf_config.normalize(config, file="config.json")
    return family("gpt_neox").Config.read(normal, file="config.json")


def config_of(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder."""
    return read_config(json.loads((folder / "config.json").read_text()))


@functools.cache  # tests share compiled programs
def make_forward(
    config: ModelConfig,
    *,
    dp: int = 1,
    mp: int = 1,
    transposed_linear: bool = False,
    dtype: Any = np.float32,
) -> Forward:
    """A model on the first dp·mp devices."""
    return Forward(config, make_mesh(dp, mp), transposed_linear, np.dtype(dtype))


def params_of(folder: Path, forward: Forward) -> Params:
    """The weights of a checkpoint folder, placed for this model."""
    tree = neox_tree(
        load_file(folder / "model.safetensors"),
        layers=forward.config.layers,
        shards=forward.mesh.shape["mp"],
        transposed_linear=forward.transposed_linear,
    )
    return place(tree, forward)


def place(tree: Tree, forward: Forward) -> Params:
    """Places numpy arrays for the model, in its dtype."""
    return jax.tree.map(
        lambda shape, array: jax.device_put(array.astype(shape.dtype), shape.sharding),
        forward.param_shapes(),
        tree,
    )
