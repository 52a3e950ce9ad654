"""Binds every parameter of a model to a view over the checkpoint's tensors, as the map says.

Nothing is dropped silently. A tensor without an entry in the map, a parameter that no tensor
fills, a parameter that two tensors fill, and a shape or dtype that does not fit are all collected
and raised together.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mtj_loader import dtypes
from mtj_loader.errors import CheckpointMismatchError, MapError, Problem
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.parameters import ParamSpec
from mtj_loader.weights.merging import SourceTensor, convert, spellings
from mtj_loader.weights.transforms import TransformContext, fused_shape, split_rows
from mtj_loader.weights.view import View, zeros
from mtj_loader.weights.weight_map import Target, TargetKey, Targets, WeightMap


@dataclass(frozen=True)
class Binding:
    """One parameter and where its elements come from.

    Attributes:
      spec: the parameter as the model declares it.
      view: all its elements, in the shape `spec.shape` or with one dimension per axis.
      divide: every element is divided by the number of shards, in float32, rounded once.
    """

    spec: ParamSpec
    view: View
    divide: bool = False


@dataclass(frozen=True)
class Comparison:
    """A copy of a tied tensor in the checkpoint, which must equal the tensor that is used."""

    copy: TensorRecord
    original: TensorRecord


@dataclass(frozen=True)
class Resolution:
    """How a checkpoint fills a model.

    Attributes:
      bindings: one per parameter of the model.
      comparisons: copies of tied tensors, to be compared while loading.
      skipped: tensors that the map lists as known and not needed.
      unmapped: tensors without an entry in the map (only with allow_unmapped).
    """

    bindings: tuple[Binding, ...]
    comparisons: tuple[Comparison, ...] = ()
    skipped: tuple[str, ...] = ()
    unmapped: tuple[str, ...] = ()


def resolve(
    weight_map: WeightMap,
    index: TensorIndex,
    specs: Sequence[ParamSpec],
    context: TransformContext,
    *,
    layers: int,
    ties: Mapping[TargetKey, TargetKey] | None = None,
    allow_unmapped: bool = False,
) -> Resolution:
    """Binds every parameter that the model declares to a view over the checkpoint's tensors.

    Args:
      weight_map: the family's map.
      index: the checkpoint's tensors.
      specs: the model's parameters for this config, shard count and orientation.
      context: shard count, vocabulary size and orientation of the weights.
      layers: the number of layers, for `{layer}`.
      ties: targets that share another target's tensor (tied embeddings). If the checkpoint has a
        copy for one of them, it must equal the other.
      allow_unmapped: list tensors without an entry instead of refusing them.

    Raises:
      CheckpointMismatchError: lists every problem found.
      MapError: an entry's transforms make another shape than the parameter's.
    """
    tensors, problems = convert(index.records, weight_map.conversions)
    resolver = _Resolver(
        map_file=weight_map.file,
        entries=weight_map.expand(layers),
        specs={(spec.module, spec.param): spec for spec in specs},
        ties=ties or {},
        zeros=weight_map.zeros(layers),
        context=context,
        problems=problems,
    )
    for tensor in tensors:
        resolver.assign(tensor)
    resolver.compare_ties()
    for key, spec in resolver.specs.items():
        resolver.bind(key, spec)
    if not allow_unmapped:
        resolver.problems += [_unmapped(tensor) for tensor in resolver.unmapped]
    if resolver.problems:
        raise CheckpointMismatchError(resolver.problems)
    return Resolution(
        tuple(resolver.bindings),
        tuple(resolver.comparisons),
        tuple(resolver.skipped),
        tuple(tensor.name for tensor in resolver.unmapped),
    )


@dataclass
class _Resolver:
    """The state of one call of `resolve`."""

    map_file: str
    entries: Mapping[str, Targets]
    specs: Mapping[TargetKey, ParamSpec]
    ties: Mapping[TargetKey, TargetKey]
    zeros: frozenset[TargetKey]
    context: TransformContext
    assigned: dict[TargetKey, list[tuple[SourceTensor, Target]]] = field(default_factory=dict)
    unusable: set[TargetKey] = field(default_factory=set)  # a problem of their tensor is reported
    bindings: list[Binding] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unmapped: list[SourceTensor] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[TargetKey, str]:
        """The name of the tensor that fills each parameter, according to the map."""
        return {target.key: name for name, targets in self.entries.items() for target in targets}

    def assign(self, tensor: SourceTensor) -> None:
        """Records which parameters a tensor fills."""
        name = match_name(tensor.name, self.entries)
        if name is None:
            self.unmapped.append(tensor)
            return
        targets = self.entries[name]
        if not targets:
            self.skipped.append(tensor.name)
            return
        # A tied parameter is not in `specs`; its tensor is compared, so it must be a whole one.
        known = self.specs if len(targets) > 1 else {**self.specs, **self.ties}
        if absent := [target.key for target in targets if target.key not in known]:
            what = "the model that config.json describes has no such parameter"
            self.problems += [_problem(what, tensor, key) for key in absent]
            self.unusable.update(target.key for target in targets)
        else:
            for part, target in self._split(tensor, targets):
                self.assigned.setdefault(target.key, []).append((part, target))

    def _split(
        self, tensor: SourceTensor, targets: Targets
    ) -> Iterator[tuple[SourceTensor, Target]]:
        """The rows of a tensor for each of its targets; the whole tensor for a single one."""
        if len(targets) == 1:
            yield tensor, targets[0]
            return
        parts = [self.context.file_shape(self.specs[t.key], t.transforms) for t in targets]
        expected = fused_shape(parts)
        if expected is None:
            what = "the map splits a tensor into parameters of different widths"
            found = ", ".join(str(list(part)) for part in parts)
            raise MapError(what, file=self.map_file, tensor=tensor.name, found=found)
        if tensor.view.shape != expected:
            rows = " + ".join(str(part[0]) for part in parts)
            self.problems.append(_wrong_shape(tensor, targets, f"{list(expected)}, {rows} rows"))
            self.unusable.update(target.key for target in targets)
            return
        for target, view in zip(targets, split_rows(tensor.view, parts), strict=True):
            yield replace(tensor, view=view), target

    def compare_ties(self) -> None:
        """Records a comparison for every copy of a tied parameter in the checkpoint."""
        for key, original_key in self.ties.items():
            for copy, target in self.assigned.get(key, []):
                for original, _ in self.assigned.get(original_key, []):
                    pair = Comparison(copy.view.records[0], original.view.records[0])
                    self.comparisons.append(pair)
                    self._check_tie(pair, copy, target)

    def _check_tie(self, pair: Comparison, tensor: SourceTensor, target: Target) -> None:
        copy, original = pair.copy, pair.original
        if (copy.shape, copy.dtype) != (original.shape, original.dtype):
            what = f"config.json ties this tensor to {original.name}, and they differ"
            expected = f"{original.dtype} {list(original.shape)}"
            found = f"{copy.dtype} {list(copy.shape)}"
            self.problems.append(_problem(what, tensor, target.key, expected, found))

    def bind(self, key: TargetKey, spec: ParamSpec) -> None:
        """Makes the view of one parameter, or records why it cannot be made."""
        assigned = self.assigned.get(key, [])
        if len(assigned) == 1:
            self._bind_one(spec, *assigned[0])
        elif assigned:
            names = ", ".join(tensor.name for tensor, _ in assigned)
            what, file = "two tensors for one parameter", assigned[0][0].file
            self.problems.append(Problem(what, file, target=" ".join(key), found=names))
        elif key in self.zeros:
            self.bindings.append(Binding(spec, zeros(spec.shape)))
        elif key not in self.unusable:
            self.problems.append(self._unfilled(key))

    def _bind_one(self, spec: ParamSpec, tensor: SourceTensor, target: Target) -> None:
        if problem := self._mismatch(spec, tensor, target):
            self.problems.append(problem)
            return
        view = self.context.apply(tensor.view, spec, target.transforms)
        if view.shape not in (spec.shape, spec.axis_sizes):
            raise MapError(
                "the map's transforms do not make the parameter's shape",
                file=self.map_file,
                tensor=tensor.name,
                key=f"{spec.module} {spec.param}",
                expected=list(spec.shape),
                found=list(view.shape),
            )
        self.bindings.append(Binding(spec, view, "divide_by_shards" in target.transforms))

    def _mismatch(self, spec: ParamSpec, tensor: SourceTensor, target: Target) -> Problem | None:
        """Why a tensor cannot fill its parameter."""
        if unknown := [name for name in tensor.dtypes if name not in dtypes.WEIGHT_DTYPES]:
            known = ", ".join(dtypes.WEIGHT_DTYPES)
            return _problem("this dtype cannot be loaded", tensor, target.key, known, unknown[0])
        if len(tensor.dtypes) > 1:
            what, found = "the parts of one parameter differ in dtype", ", ".join(tensor.dtypes)
            return _problem(what, tensor, target.key, "one dtype", found)
        if transform := self.context.inapplicable(spec, target.transforms):
            what = "the map gives a transform that does not fit the parameter"
            return _problem(what, tensor, target.key, found=transform)
        expected = self.context.file_shape(spec, target.transforms)
        if tensor.view.shape != expected:
            return _wrong_shape(tensor, (target,), str(list(expected)))
        return None

    def _unfilled(self, key: TargetKey) -> Problem:
        if key in self.names:
            what = "the checkpoint has no tensor for a parameter of the model"
            return Problem(what, tensor=self.names[key], target=" ".join(key))
        what = "the map has no entry for a parameter of the model"
        return Problem(what, self.map_file, target=" ".join(key))


def match_name(name: str, entries: Container[str]) -> str | None:
    """The entry that a tensor's name matches, exactly or up to one known base prefix.

    Published files include or omit the prefix of the base model; nothing else may differ.
    """
    return next((spelling for spelling in spellings(name) if spelling in entries), None)


def _problem(
    what: str,
    tensor: SourceTensor,
    key: TargetKey,
    expected: str | None = None,
    found: str | None = None,
) -> Problem:
    return Problem(what, tensor.file, tensor.name, " ".join(key), expected, found)


def _wrong_shape(tensor: SourceTensor, targets: Targets, expected: str) -> Problem:
    what = "the shape does not fit the model that config.json describes"
    names = ", ".join(" ".join(target.key) for target in targets)
    found = str(list(tensor.view.shape))
    return Problem(what, tensor.file, tensor.name, names, expected, found)


def _unmapped(tensor: SourceTensor) -> Problem:
    found = f"{tensor.dtypes[0]} {list(tensor.view.shape)}"
    what = "the map has no entry for this tensor"
    return Problem(what, tensor.file, tensor.name, found=found)
