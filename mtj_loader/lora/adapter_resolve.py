"""LoRA (Hu et al., 2021, arXiv:2106.09685): an adapter's tensors as low-rank terms of parameters.

W += scale · B · A, with A [r, in] and B [out, r] in torch's order. If the map merges tensors into
one parameter (experts), their factors are concatenated along the rank, with zeros elsewhere. If
the map splits a tensor into several parameters, the rows of B are split the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtj_loader import dtypes
from mtj_loader.errors import AdapterError, AdapterMismatchError, Problem
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.lora.adapter import CONFIG_FILE, PATTERN_KEYS, Adapter
from mtj_loader.lora.low_rank import (
    AdapterTerms,
    BaseWeightCopy,
    Factors,
    LowRank,
    merge_factors,
)
from mtj_loader.lora.patterns import UnsupportedPatternError
from mtj_loader.parameters import ParamSpec
from mtj_loader.weights.merging import Conversions, Merge, spellings
from mtj_loader.weights.resolve import match_name
from mtj_loader.weights.transforms import Shape, TransformContext, fused_shape, split_rows
from mtj_loader.weights.view import view_of
from mtj_loader.weights.weight_map import Target, TargetKey, Targets, WeightMap

_PREFIX = "base_model.model."  # of every tensor name that PEFT writes
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")
_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
# Parameters of nn.Embedding modules; all others belong to linear layers or experts.
_EMBEDDINGS = {("embedding_shard/~/linear", "w"), ("embedding_shard", "pos_embs")}
_NESTED = ".base_layer"  # a second adapted parameter of one module wraps the first


def resolve_adapter(
    adapter: Adapter,
    weight: float,
    weight_map: WeightMap,
    index: TensorIndex,
    specs: Sequence[ParamSpec],
    *,
    context: TransformContext,
    layers: int,
) -> AdapterTerms:
    """Finds the parameters that every tensor of an adapter changes.

    Args:
      adapter: an opened adapter.
      weight: an extra factor on top of the adapter's own scale.
      weight_map: the family's map.
      index: the checkpoint's tensors, to find the originals of base weights.
      specs: the model's parameters.
      context: shard count, vocabulary size and orientation of the weights.
      layers: the number of layers, for `{layer}`.

    Raises:
      AdapterMismatchError: tensors that fit no parameter, incomplete pairs, wrong ranks or shapes;
        lists every problem.
      AdapterError: its patterns take too long to match.
    """
    entries, conversions = weight_map.expand(layers), weight_map.conversions
    by_target = {(spec.module, spec.param): spec for spec in specs}
    resolver = _AdapterResolver(adapter, weight, index, context, entries, conversions, by_target)
    for record in adapter.records.values():
        resolver.sort(record)
    try:
        for module, pair in resolver.pairs.items():
            resolver.place(module, pair)
    except UnsupportedPatternError as error:
        file = f"{adapter.location}/{CONFIG_FILE}"
        raise AdapterError(str(error), file=file, key=" or ".join(PATTERN_KEYS)) from error
    resolver.merge()
    if not resolver.terms and not resolver.problems:
        what = "the adapter has no LoRA tensor"
        resolver.problems.append(Problem(what, file=adapter.file.path))
    if resolver.problems:
        raise AdapterMismatchError(resolver.problems)
    return AdapterTerms(resolver.terms, tuple(resolver.copies))


@dataclass
class _Pair:
    """The factors of one module."""

    embedding: bool = False
    factors: dict[str, TensorRecord] = field(default_factory=dict)  # "A", "B"


@dataclass
class _AdapterResolver:
    """The state of one call of `resolve_adapter`."""

    adapter: Adapter
    weight: float
    index: TensorIndex
    context: TransformContext
    entries: Mapping[str, Targets]
    conversions: Conversions
    specs: Mapping[TargetKey, ParamSpec]
    pairs: dict[str, _Pair] = field(default_factory=dict)
    placed: set[str] = field(default_factory=set)  # target_parameters that already have a pair
    parts: dict[tuple[str, Merge], list[dict[int, Factors]]] = field(default_factory=dict)
    terms: dict[TargetKey, LowRank] = field(default_factory=dict)
    copies: list[BaseWeightCopy] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def sort(self, record: TensorRecord) -> None:
        """Adds one tensor of the adapter to the factors of its module."""
        name = record.name.removeprefix(_PREFIX)
        if record.dtype not in dtypes.WEIGHT_DTYPES:
            self.refuse("this dtype cannot be loaded", record, found=record.dtype)
        elif not record.name.startswith(_PREFIX):
            self.refuse(f"tensor names of an adapter begin with {_PREFIX}", record)
        elif found := _FACTOR.fullmatch(name):
            pair = self.pairs.setdefault(found["module"], _Pair(found["embedding"] is not None))
            if pair.embedding != (found["embedding"] is not None):
                self.refuse("only one of the two factors is an embedding's", record)
            elif pair.factors.setdefault(found["factor"], record) is not record:
                self.refuse("two tensors for one factor", record)
        elif found := _COPY.fullmatch(name):
            self.carry(record, found["module"] + ".weight")
        else:
            self.refuse("this tensor of the adapter would not be used", record)

    def carry(self, record: TensorRecord, name: str) -> None:
        """Records a copy of a base weight, to be compared."""
        found = next((s for s in spellings(name) if s in self.index.records), None)
        original = self.index.records[found] if found else None
        if original is None or original.shape != record.shape:
            expected = "none" if original is None else str(list(original.shape))
            self.refuse(
                "the adapter contains a base weight that the checkpoint does not have",
                record,
                expected=expected,
                found=str(list(record.shape)),
            )
            return
        self.copies.append(BaseWeightCopy(self.adapter.storage, record, original))

    def place(self, module: str, pair: _Pair) -> None:
        """Turns a pair into factors and adds them to the parameter that they belong to."""
        if missing := {"A", "B"} - pair.factors.keys():
            record = next(iter(pair.factors.values()))
            self.refuse("half of a pair", record, expected=f"also lora_{missing.pop()}")
            return
        record = next((r for r in pair.factors.values() if len(r.shape) != 2), None)
        if record is not None:
            self.refuse("a factor is a matrix", record, found=str(list(record.shape)))
        elif names := self.parameters_of(module):
            self.place_parameter(module, names, pair)
        elif not self.adapter.config.modules.includes(module):
            what = "PEFT ignores this tensor: the adapter's settings do not select its module"
            self.refuse(what, pair.factors["A"])
        elif pair.embedding:
            self.place_embedding(module, pair)
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
                parts = self.parts.setdefault((located[0], merge), empty)[found[0]]
                if parts.setdefault(found[1], factors) is not factors:
                    self.refuse("two pairs of factors for one matrix", a)
                return
        self.add("".join(located) if located else module + ".weight", factors, a)

    def parameters_of(self, module: str) -> list[str]:
        """The parameters of a module that `target_parameters` lists, by name."""
        owner = module.removesuffix(_NESTED)
        listed = self.adapter.config.target_parameters
        names = [(f"{owner}.{target.rpartition('.')[2]}", target) for target in listed]
        return [
            name
            for name, target in names
            if f".{name}".endswith(f".{target}") and self.filled_by(name)
        ]

    def place_parameter(self, module: str, names: Sequence[str], pair: _Pair) -> None:
        """Adds an adapted parameter of a module; the shapes tell which of the listed ones it is."""
        a, b = pair.factors["A"], pair.factors["B"]
        for name in names:
            shape = fused_shape(self.file_shapes(self.filled_by(name)))
            if shape is None or len(shape) < 2 or name in self.placed:
                continue
            *experts, outs, ins = shape
            if (b.shape[0], a.shape[1]) == (outs, ins):
                self.placed.add(name)
                self.add_parameter(name, experts, a, b)
                return
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        self.refuse("these factors fit none of target_parameters", a, ", ".join(names), shapes)

    def add_parameter(
        self, name: str, experts: Sequence[int], a: TensorRecord, b: TensorRecord
    ) -> None:
        """Adds the factors of a matrix, or of a stack of matrices, one per expert."""
        count = math.prod(experts)
        ranks = [(n // count,) if n % count == 0 else (n,) for n in (a.shape[0], b.shape[1])]
        rank = self.checked_rank(name, ranks[0], ranks[1], a)
        if rank is None:
            return
        right, left = view_of(a), view_of(b)
        if experts:  # PEFT stores A [E·r, in] with experts outermost, B [out, r·E] innermost
            right = right.split_axis(0, (count, rank))
            left = left.split_axis(1, (rank, count)).transpose((2, 0, 1))
        self.add(name, Factors(right, left, self.scales(name, (*experts, rank))), a)

    def checked_rank(
        self, module: str, a: Sequence[int], b: Sequence[int], record: TensorRecord
    ) -> int | None:
        """The rank, if both factors have the rank that the config gives the module."""
        expected = self.adapter.config.rank_of(module)
        if tuple(a) == tuple(b) == (expected,):
            return expected
        found = f"A {list(a)}, B {list(b)}"
        self.refuse("wrong rank", record, expected=str(expected), found=found)
        return None

    def scales(self, module: str, shape: tuple[int, ...]) -> np.ndarray:
        scale = self.adapter.config.scale_of(module) * self.weight
        return np.full(shape, scale, np.float32)

    def filled_by(self, name: str) -> list[tuple[Target, ParamSpec]]:
        """The parameters that a tensor of this name fills; empty if the model lacks any of them."""
        entry = match_name(name, self.entries)
        targets = () if entry is None else self.entries[entry]
        found = [(target, self.specs[target.key]) for target in targets if target.key in self.specs]
        return found if len(found) == len(targets) else []

    def file_shapes(self, filled: Sequence[tuple[Target, ParamSpec]]) -> list[Shape]:
        return [self.context.file_shape(spec, target.transforms) for target, spec in filled]

    def merge(self) -> None:
        """Builds the factors of parameters that are merged from many tensors."""
        for (prefix, merge), parts in self.parts.items():
            name = prefix + merge.target
            first = next(factors for part in parts for factors in part.values())
            record = first.a.records[0]
            filled = self.filled_by(name)
            if not filled:
                self.refuse("there is no such parameter in the model", record)
                continue
            try:
                factors = merge_factors(parts, experts=filled[0][1].shape[0])
            except ValueError as error:
                self.refuse(f"factors cannot be merged: {error}", record)
                continue
            self.add(name, factors, record)

    def add(
        self, name: str, factors: Factors, record: TensorRecord, *, embedding: bool = False
    ) -> None:
        """Adds factors to the parameters that a tensor of this name fills."""
        filled = self.filled_by(name)
        if not filled:
            self.refuse("there is no such parameter in the model", record)
            return
        if any((target.key in _EMBEDDINGS) != embedding for target, _ in filled):
            self.refuse("lora_embedding_A and _B are for embeddings, and only for them", record)
            return
        if any(target.key in self.terms for target, _ in filled):
            self.refuse("two pairs of factors for one parameter", record)
            return
        shapes = self.file_shapes(filled)
        expected = fused_shape(shapes)
        found = (*factors.b.shape[:-1], factors.a.shape[-1])
        if found != expected:
            what = "the adapter was made for another shape"
            self.refuse(what, record, str(list(expected or ())), str(list(found)))
            return
        for (target, spec), b in zip(filled, split_rows(factors.b, shapes), strict=True):
            left, right = self.context.apply_factors(b, factors.a, spec, target.transforms)
            term = LowRank(spec, self.adapter.storage, left, right, factors.scales)
            self.terms[target.key] = term

    def refuse(
        self,
        what: str,
        record: TensorRecord,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        self.problems.append(
            Problem(what, self.adapter.file.path, record.name, None, expected, found)
        )
