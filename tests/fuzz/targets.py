"""What is fuzzed: a sound input, its random change, the load, and a check of what was loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors

import mtj_loader
from mtj_loader.generation.tokenizer import load_tokenizer
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_pickle
from tests.support import neox, torch_files
from tests.support.adapters import CONFIG as ADAPTER_CONFIG
from tests.support.adapters import linear, merged, write_adapter
from tests.support.checkpoints import safetensors_bytes, safetensors_header, write_checkpoint
from tests.support.models import DATA
from tests.support.mtj_tree import neox_tree

_HAS_TORCH = importlib.util.find_spec("torch") is not None
_TOLERANCE = 1e-4  # of logits in float32
_IDS = np.arange(14, dtype=np.int32).reshape(2, 7)
_MODULES = ["query_key_value", "dense"]  # that adapters adapt
_TEXT = "Hello,  wörld!\n\n<|endoftext|> 🙂 <s>x"


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
      change: writes a variant into an empty folder; returns what is to be loaded and, if it can
        be known without an oracle, what must come out.
      load: loads it, or raises one of our errors.
      check: raises AssertionError if the result is not what the variant says.
    """

    change: Callable[[Path, Random], Any]
    load: Callable[[Path, Any], Any]
    check: Callable[[Path, Any, Any], None]


def _oracle() -> Any:
    return importlib.import_module("tests.fuzz.oracle")


# ---- config.json, of every family


@functools.cache
def _config_seeds() -> list[Path]:
    folders = [*(DATA / "families").glob("*/*"), *(DATA / "neox_parity").iterdir()]
    return sorted(folder for folder in folders if (folder / "logits.npy").exists())


def _change_config(folder: Path, random: Random) -> Path:
    seed = random.choice(_config_seeds())
    shutil.copy(seed / "model.safetensors", folder)
    config = json.loads((seed / "config.json").read_text())
    (folder / "config.json").write_bytes(mutate_json(config, random))
    return seed


def _load_config(folder: Path, seed: Path) -> mtj_loader.LoadPlan:
    return mtj_loader.plan(folder, "mp=1", dtype="float32")


def _check_config(folder: Path, seed: Path, plan: mtj_loader.LoadPlan) -> None:
    """The logits are transformers', where it loads the variant too."""
    if not _HAS_TORCH:
        return
    ids = np.load(seed / "ids.npy")
    theirs = _oracle().logits_of_checkpoint(folder, ids)
    if theirs is None:
        return
    if plan.config == mtj_loader.plan(seed, "mp=1").config:
        ours = np.load(seed / "logits.npy")
    else:
        ours = np.asarray(mtj_loader.load(folder, "mp=1", dtype="float32").logits(ids))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=_TOLERANCE)


# ---- adapters


@functools.cache
def _terms() -> dict[str, np.ndarray]:
    terms: dict[str, np.ndarray] = {}
    for layer in range(2):
        for module, outs in zip(_MODULES, (72, 24), strict=True):
            name = f"gpt_neox.layers.{layer}.attention.{module}"
            terms |= linear(name, outs, 24, seed=len(terms))
    return terms


def _write_base(folder: Path) -> Path:
    return neox.write(folder / "base")


def _change_adapter_config(folder: Path, random: Random) -> None:
    _write_base(folder)
    write_adapter(folder / "adapter", _terms())
    settings = ADAPTER_CONFIG | {
        "target_modules": _MODULES,
        "rank_pattern": {"dense": 3},
        "alpha_pattern": {"layers.1.attention.dense": 7},
        "use_rslora": False,
        "layers_to_transform": None,
        "lora_bias": False,
    }
    (folder / "adapter" / "adapter_config.json").write_bytes(mutate_json(settings, random))


def _load_adapter(folder: Path, expected: object) -> mtj_loader.Model:
    return mtj_loader.load(
        folder / "base", "mp=1", dtype="float32", adapter=folder / "adapter", progress=False
    )


def _check_adapter_config(folder: Path, expected: None, model: mtj_loader.Model) -> None:
    """The logits are PEFT's, where it loads the variant too and its scales do not overflow."""
    if _HAS_TORCH:
        theirs = _oracle().logits_with_adapter(folder / "base", folder / "adapter", _IDS)
        if theirs is not None and np.isfinite(theirs).all():
            ours = np.asarray(model.logits(_IDS))
            np.testing.assert_allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE)


def _change_adapter_tensors(folder: Path, random: Random) -> bytes:
    _write_base(folder)
    write_adapter(folder / "adapter", _terms())
    file = folder / "adapter" / "adapter_model.safetensors"
    data = _mutate_safetensors(_terms(), random)
    file.write_bytes(data)
    return data


def _check_adapter_tensors(folder: Path, data: bytes, model: mtj_loader.Model) -> None:
    _check_merged(model, load_safetensors(data))


def _check_merged(model: mtj_loader.Model, terms: dict[str, np.ndarray]) -> None:
    """The parameters are the base weights plus these terms."""
    scale = ADAPTER_CONFIG["lora_alpha"] / ADAPTER_CONFIG["r"]  # pyright: ignore[reportOperatorIssue]
    _assert_tree(model, merged(neox.tensors(), terms, scale), rtol=1e-5)


# ---- adapters in torch's format


def _change_pickle(folder: Path, random: Random) -> bytes:
    _write_base(folder)
    write_adapter(folder / "adapter", {}, target_modules=_MODULES)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    entries, storages = [], {}
    for key, (name, array) in enumerate(_terms().items()):
        where = torch_files.storage(str(key), array.size)
        strides = (array.shape[1], 1)
        entries += [torch_files.text(name), torch_files.tensor(array.shape, strides, where=where)]
        storages[str(key)] = array.tobytes()
    pickle = torch_files.pickle_of(*entries)
    if random.random() < 0.7:
        data = torch_files.torch_zip(mutate_pickle(pickle, random), storages)
    else:
        data = mutate_bytes(torch_files.torch_zip(pickle, storages), random)
    (folder / "adapter" / "adapter_model.bin").write_bytes(data)
    return data


def _check_pickle(folder: Path, data: bytes, model: mtj_loader.Model) -> None:
    """The tensors are those that torch reads."""
    if _HAS_TORCH:
        _check_merged(model, _oracle().tensors_of_torch_file(data))


# ---- the index and the headers of safetensors


def _change_index(folder: Path, random: Random) -> None:
    tensors = neox.tensors()
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:9]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[9:]},
    }
    write_checkpoint(folder, shards, neox.CONFIG)
    if random.random() < 0.5:
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        changed = mutate_json(index, random)
        file.write_bytes(changed if random.random() < 0.8 else mutate_bytes(changed, random))
    else:
        name = random.choice(list(shards))
        (folder / name).write_bytes(_mutate_safetensors(shards[name], random))


def _load_checkpoint(folder: Path, expected: object) -> mtj_loader.Model:
    return mtj_loader.load(folder, "mp=1", dtype="float32", progress=False)


def _check_index(folder: Path, expected: None, model: mtj_loader.Model) -> None:
    """Each tensor is the one that safetensors reads from the file that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_safetensors((folder / name).read_bytes()) for name in set(index.values())}
    _assert_tree(model, {name: files[file][name] for name, file in index.items()})


def _mutate_safetensors(tensors: dict[str, np.ndarray], random: Random) -> bytes:
    data = b"".join(array.tobytes() for array in tensors.values())
    header = safetensors_header(tensors)
    if random.random() < 0.7:
        return safetensors_bytes(mutate_json(header, random), data)
    return mutate_bytes(safetensors_bytes(header, data), random)


def _assert_tree(
    model: mtj_loader.Model, tensors: dict[str, np.ndarray], rtol: float = 0.0
) -> None:
    tree = neox_tree(tensors, layers=2, shards=1, transposed_linear=False)
    assert tree.keys() == model.params.keys()
    for module, params in tree.items():
        for name, array in params.items():
            found = np.asarray(model.params[module][name])
            np.testing.assert_allclose(found, array.astype(np.float32), rtol=rtol, atol=rtol)


# ---- tokenizers


_TOKENIZER_FILES = {"tokenizer.json", "vocab.json"}


@functools.cache
def _tokenizer_seeds() -> list[dict[str, bytes]]:
    """Small tokenizers of several kinds: file name → content."""
    return importlib.import_module("tests.fuzz.tokenizers").seeds()


def _change_tokenizer(folder: Path, random: Random) -> None:
    seed = random.choice(_tokenizer_seeds())
    changed = random.choice(list(seed))
    for name, data in seed.items():
        if name != changed:
            content = data
        elif name.endswith(".json") and random.random() < 0.8:
            content = mutate_json(json.loads(data), random)
        else:
            content = mutate_bytes(data, random)
        (folder / name).write_bytes(content)


def _load_tokenizer(folder: Path, expected: object) -> list[int] | None:
    tokenizer = load_tokenizer({path.name: path for path in folder.iterdir()})
    if tokenizer is None:
        return None
    ids = tokenizer.encode(_TEXT)
    tokenizer.decode([*ids, 0, 3, 10**6])
    return ids


def _check_tokenizer(folder: Path, expected: object, ids: list[int] | None) -> None:
    """The ids are transformers', where it loads the variant too."""
    theirs = _oracle().token_ids(folder, _TEXT) if _HAS_TORCH and ids is not None else None
    assert theirs is None or ids == theirs


TARGETS = {
    "config": Target(_change_config, _load_config, _check_config),
    "adapter-config": Target(_change_adapter_config, _load_adapter, _check_adapter_config),
    "adapter-tensors": Target(_change_adapter_tensors, _load_adapter, _check_adapter_tensors),
    "pickle": Target(_change_pickle, _load_adapter, _check_pickle),
    "index": Target(_change_index, _load_checkpoint, _check_index),
    "tokenizer": Target(_change_tokenizer, _load_tokenizer, _check_tokenizer),
}
