"""LoRA (Hu et al., 2021, arXiv:2106.09685): an adapter's tensors as low-rank terms of parameters.

W += scale · B · A, with A [r, in] and B [out, r] in torch's order. Adapters on experts stored one
by one go through the map's conversions: the factors of one merged parameter stand side by side
along the rank, zeros between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtj_loader import dtypes
from mtj_loader.errors import AdapterMismatchError, Problem
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.lora.adapter import Adapter
from mtj_loader.lora.low_rank import (
    AdapterTerms,
    CarriedCopy,
    Factors,
    LowRank,
    merged_factors,
)
from mtj_loader.parameters import ParamSpec
from mtj_loader.weights.merging import Conversions, Merge, spellings
from mtj_loader.weights.resolve import TargetKey, match_name
from mtj_loader.weights.transforms import Layout
from mtj_loader.weights.view import view_of
from mtj_loader.weights.weight_map import Target, WeightMap

_PREFIX = "base_model.model."  # PEFT puts it before every name
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")
_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
# What torch computes with nn.Embedding; everything else is a linear layer or experts.
_EMBEDDINGS = {("embedding_shard/~/linear", "w"), ("embedding_shard", "pos_embs")}
_NESTED = ".base_layer"  # a second adapted parameter of one module wraps the first


def resolve_adapter(
    adapter: Adapter,
    weight: float,
    weight_map: WeightMap,
    index: TensorIndex,
    specs: Sequence[ParamSpec],
    *,
    layout: Layout,
    layers: int,
) -> AdapterTerms:
    """Finds the parameter of every tensor of an adapter.

    Args:
      adapter: an opened adapter.
      weight: a factor on top of the adapter's own scale.
      weight_map: the family's map.
      index: the checkpoint's tensors, for copies of base weights.
      specs: the model's parameters.
      layout: shard count, vocabulary and order of the weights.
      layers: how far `{layer}` runs.

    Raises:
      AdapterMismatchError: tensors that fit nothing, halves of pairs, wrong ranks or shapes; lists
        every problem.
    """
    work = _Work(adapter, weight, weight_map, index, layout)
    work.entries = weight_map.expand(layers)
    work.specs = {(spec.module, spec.param): spec for spec in specs}
    for record in adapter.records.values():
        work.file(record)
    for module, pair in work.pairs.items():
        work.place(module, pair)
    work.merge()
    if not work.terms and not work.problems:
        work.problems.append(Problem("the adapter has no LoRA tensor", file=adapter.stamp.path))
    if work.problems:
        raise AdapterMismatchError(work.problems)
    return AdapterTerms(work.terms, tuple(work.copies))


@dataclass
class _Pair:
    """The factors of one module, as they are found."""

    embedding: bool = False
    factors: dict[str, TensorRecord] = field(default_factory=dict)  # "A", "B"


@dataclass
class _Work:
    """The tables that one `resolve_adapter` fills."""

    adapter: Adapter
    weight: float
    weight_map: WeightMap
    index: TensorIndex
    layout: Layout
    entries: Mapping[str, Target | None] = field(default_factory=dict)
    specs: Mapping[TargetKey, ParamSpec] = field(default_factory=dict)
    pairs: dict[str, _Pair] = field(default_factory=dict)
    placed: set[str] = field(default_factory=set)  # target_parameters that have their pair
    parts: dict[tuple[str, Merge], list[dict[int, Factors]]] = field(default_factory=dict)
    terms: dict[TargetKey, LowRank] = field(default_factory=dict)
    copies: list[CarriedCopy] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def conversions(self) -> Conversions:
        return self.weight_map.conversions

    def file(self, record: TensorRecord) -> None:
        """Files one tensor of the adapter under its module."""
        name = record.name.removeprefix(_PREFIX)
        if record.dtype not in dtypes.WEIGHT_DTYPES:
            self.refuse("this dtype cannot be loaded", record, found=record.dtype)
        elif not record.name.startswith(_PREFIX):
            self.refuse(f"an adapter's names begin with {_PREFIX}", record)
        elif found := _FACTOR.fullmatch(name):
            pair = self.pairs.setdefault(found["module"], _Pair(found["embedding"] is not None))
            if pair.embedding != (found["embedding"] is not None):
                self.refuse("one factor is of an embedding and one is not", record)
            elif pair.factors.setdefault(found["factor"], record) is not record:
                self.refuse("two tensors for one factor", record)
        elif found := _COPY.fullmatch(name):
            self.carry(record, found["module"] + ".weight")
        else:
            self.refuse("an adapter's tensor that is not used", record)

    def carry(self, record: TensorRecord, name: str) -> None:
        """Notes a copy of a base weight, to be compared."""
        found = next((s for s in spellings(name) if s in self.index.records), None)
        original = self.index.records[found] if found else None
        if original is None or original.shape != record.shape:
            expected = "none" if original is None else str(list(original.shape))
            self.refuse(
                "a base weight that the adapter carries is not the checkpoint's",
                record,
                expected=expected,
                found=str(list(record.shape)),
            )
            return
        self.copies.append(CarriedCopy(self.adapter.storage, record, original))

    def place(self, module: str, pair: _Pair) -> None:
        """Turns a pair into factors and files them under the parameter that they belong to."""
        if missing := {"A", "B"} - pair.factors.keys():
            record = next(iter(pair.factors.values()))
            self.refuse("half a pair", record, expected=f"lora_{missing.pop()} too")
            return
        record = next((r for r in pair.factors.values() if len(r.shape) != 2), None)
        if record is not None:
            self.refuse("a factor is a matrix", record, found=str(list(record.shape)))
        elif pair.embedding:
            self.place_embedding(module, pair)
        elif names := self.parameters_of(module):
            self.place_parameter(module, names, pair)
        else:
            self.place_linear(module, pair)

    def place_embedding(self, module: str, pair: _Pair) -> None:
        # lora_embedding_A is [r, V] and lora_embedding_B [d, r]: the table's rows are A's columns.
        a, b = pair.factors["A"], pair.factors["B"]
        rank = self.checked_rank(module, a.shape[:1], b.shape[1:], a)
        if rank is not None:
            scales = self.scales(module, (rank,))
            rows, columns = view_of(a).transpose((1, 0)), view_of(b).transpose((1, 0))
            self.add(module + ".weight", Factors(columns, rows, scales), a, embedding=True)

    def place_linear(self, module: str, pair: _Pair) -> None:
        a, b = pair.factors["A"], pair.factors["B"]
        rank = self.checked_rank(module, a.shape[:1], b.shape[1:], a)
        if rank is None:
            return
        factors = Factors(view_of(a), view_of(b), self.scales(module, (rank,)))
        located = self.conversions.locate(module + ".weight") if self.conversions.merges else None
        for merge in self.conversions.merges if located else ():
            assert located is not None
            if (found := merge.match(located[1])) is not None:
                empty: list[dict[int, Factors]] = [{} for _ in merge.sources]
                filed = self.parts.setdefault((located[0], merge), empty)[found[0]]
                if filed.setdefault(found[1], factors) is not factors:
                    self.refuse("two adapters for one matrix", a)
                return
        self.add("".join(located) if located else module + ".weight", factors, a)

    def parameters_of(self, module: str) -> list[str]:
        """The names of the parameters of a module that `target_parameters` lists."""
        owner = module.removesuffix(_NESTED)
        listed = self.adapter.config.target_parameters
        names = [(f"{owner}.{target.rpartition('.')[2]}", target) for target in listed]
        return [
            name
            for name, target in names
            if f".{name}".endswith(f".{target}") and self.target_of(name)[1] is not None
        ]

    def place_parameter(self, module: str, names: Sequence[str], pair: _Pair) -> None:
        """An adapted parameter of a module: which of the listed ones, the shapes tell."""
        a, b = pair.factors["A"], pair.factors["B"]
        for name in names:
            target, spec = self.target_of(name)
            if target is None or spec is None or len(spec.shape) < 2 or name in self.placed:
                continue
            *experts, outs, ins = self.layout.file_shape(spec, target.transforms)
            if (b.shape[0], a.shape[1]) == (outs, ins):
                self.placed.add(name)
                self.add_parameter(name, experts, a, b)
                return
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        self.refuse("fits none of target_parameters", a, ", ".join(names), shapes)

    def add_parameter(
        self, name: str, experts: Sequence[int], a: TensorRecord, b: TensorRecord
    ) -> None:
        """Files the factors of a matrix, or of a stack of `experts` matrices."""
        count = math.prod(experts)
        ranks = [(n // count,) if n % count == 0 else (n,) for n in (a.shape[0], b.shape[1])]
        rank = self.checked_rank(name, ranks[0], ranks[1], a)
        if rank is None:
            return
        right, left = view_of(a), view_of(b)
        if experts:  # PEFT keeps A [E·r, in], expert by expert, and B [out, r·E], experts fastest
            right = right.split_axis(0, (count, rank))
            left = left.split_axis(1, (rank, count)).transpose((2, 0, 1))
        self.add(name, Factors(right, left, self.scales(name, (*experts, rank))), a)

    def checked_rank(
        self, module: str, a: Sequence[int], b: Sequence[int], record: TensorRecord
    ) -> int | None:
        """The rank, if both factors have the one that the config gives the module."""
        expected = self.adapter.config.rank_of(module)
        if tuple(a) == tuple(b) == (expected,):
            return expected
        found = f"A {list(a)}, B {list(b)}"
        self.refuse("wrong rank", record, expected=str(expected), found=found)
        return None

    def scales(self, module: str, shape: tuple[int, ...]) -> np.ndarray:
        scale = self.adapter.config.scale_of(module) * self.weight
        return np.full(shape, scale, np.float32)

    def target_of(self, name: str) -> tuple[Target | None, ParamSpec | None]:
        entry = match_name(name, self.entries)
        target = None if entry is None else self.entries[entry]
        return target, target and self.specs.get((target.module, target.param))

    def merge(self) -> None:
        """Builds the factors of parameters that are merged from parts."""
        for (prefix, merge), parts in self.parts.items():
            name = prefix + merge.target
            first = next(factors for part in parts for factors in part.values())
            record = first.a.records[0]
            _, spec = self.target_of(name)
            if spec is None:
                self.refuse("there is no such parameter in the model", record)
                continue
            try:
                factors = merged_factors(parts, experts=spec.shape[0])
            except ValueError as error:
                self.refuse(f"factors cannot be merged: {error}", record)
                continue
            self.add(name, factors, record)

    def add(
        self, name: str, factors: Factors, record: TensorRecord, *, embedding: bool = False
    ) -> None:
        """Files factors under the parameter of this name, in the parameter's order."""
        target, spec = self.target_of(name)
        if target is None or spec is None:
            self.refuse("there is no such parameter in the model", record)
            return
        key = (target.module, target.param)
        if (key in _EMBEDDINGS) != embedding:
            self.refuse("embeddings, and they alone, have lora_embedding_A and _B", record)
            return
        if key in self.terms:
            self.refuse("two adapters for one parameter", record)
            return
        expected = self.layout.file_shape(spec, target.transforms)
        found = (*factors.b.shape[:-2], factors.b.shape[-2], factors.a.shape[-1])
        if found != expected:
            what = "the adapter was made for another shape"
            self.refuse(what, record, str(list(expected)), str(list(found)))
            return
        left, right = self.layout.apply_factors(factors.b, factors.a, spec, target.transforms)
        self.terms[key] = LowRank(spec, self.adapter.storage, left, right, factors.scales)

    def refuse(
        self,
        what: str,
        record: TensorRecord,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        self.problems.append(
            Problem(what, self.adapter.stamp.path, record.name, None, expected, found)
        )
