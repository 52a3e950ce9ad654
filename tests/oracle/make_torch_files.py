"""Writes tests/data/torch_zip: small files from torch.save of torch 2.13.

python -m tests.oracle.make_torch_files
"""

from __future__ import annotations

from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1] / "data" / "torch_zip"


def tensors() -> dict[str, torch.Tensor]:
    """Every supported dtype, and every form of a plain tensor."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "float32": base,
        "transposed": base.T,  # shares the storage of float32
        "part": base[1:, 1:3],  # this too
        "every_second": torch.arange(10, dtype=torch.int64)[1::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "bfloat16": torch.tensor([1.0, -2.5, 3.140625], dtype=torch.bfloat16),
        "float16": torch.tensor([[1.0], [65504.0]], dtype=torch.float16),
        "float64": torch.tensor([0.1], dtype=torch.float64),
        "int64": torch.tensor([2**40, -1]),
        "int32": torch.tensor([-7], dtype=torch.int32),
        "int16": torch.tensor([-300], dtype=torch.int16),
        "int8": torch.tensor([-8, 9], dtype=torch.int8),
        "uint8": torch.tensor([200], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.tensor([0.5])),
    }


def state_dict() -> dict[str, torch.Tensor]:
    """An OrderedDict with `_metadata`, as returned by modules."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    state = module.state_dict()
    for i, value in enumerate(state.values()):
        value.copy_(torch.arange(value.numel()).reshape(value.shape) + 10 * i)
    return state


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(), FOLDER / "tensors.bin")
    torch.save(state_dict(), FOLDER / "state_dict.bin")
    torch.save({"w": torch.ones(2)}, FOLDER / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.eye(2).to_sparse()}, FOLDER / "sparse.bin")
    torch.save({"w": torch.nn.Buffer(torch.ones(2))}, FOLDER / "subclass.bin")
    script = torch.jit.script(torch.nn.Identity())
    torch.jit.save(script, str(FOLDER / "torchscript.bin"))


if __name__ == "__main__":
    main()
