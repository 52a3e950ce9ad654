"""Map × checkpoint × model: which view fills which parameter, or every reason why not.

Nothing is silent. A tensor that no entry knows, a parameter that no tensor fills, a parameter
filled twice, a shape or dtype that does not fit: all are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mtj_loader import dtypes
from mtj_loader.errors import CheckpointMismatchError, MapError, Problem
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.parameters import ParamSpec
from mtj_loader.weights.merging import Source, convert, spellings
from mtj_loader.weights.transforms import Layout
from mtj_loader.weights.view import View, zeros
from mtj_loader.weights.weight_map import Target, WeightMap

TargetKey = tuple[str, str]  # (module without root, param)


@dataclass(frozen=True)
class Binding:
    """One parameter and where its elements come from.

    Attributes:
      spec: the parameter as the model declares it.
      view: its elements, whole, in the shape `spec.shape` or with one dimension per axis.
      divide: every element is divided by the number of shards, in float32, rounded once.
    """

    spec: ParamSpec
    view: View
    divide: bool = False


@dataclass(frozen=True)
class Comparison:
    """A tied copy that the file carries all the same: it must be equal to the one that is used."""

    copy: TensorRecord
    original: TensorRecord


@dataclass(frozen=True)
class Resolution:
    """How a checkpoint fills a model.

    Attributes:
      bindings: one per parameter of the model.
      comparisons: tied copies to compare while loading.
      skipped: tensors that the map names as known and not needed.
      unmapped: tensors that no entry knows (only with allow_unmapped).
    """

    bindings: tuple[Binding, ...]
    comparisons: tuple[Comparison, ...] = ()
    skipped: tuple[str, ...] = ()
    unmapped: tuple[str, ...] = ()


def resolve(
    weight_map: WeightMap,
    index: TensorIndex,
    specs: Sequence[ParamSpec],
    layout: Layout,
    *,
    layers: int,
    ties: Mapping[TargetKey, TargetKey] | None = None,
    allow_unmapped: bool = False,
) -> Resolution:
    """Binds every parameter that the model declares to a view over the checkpoint's tensors.

    Args:
      weight_map: the family's map.
      index: the checkpoint's tensors.
      specs: the model's parameters for this config, shard count and layout.
      layout: shard count, vocabulary and order of the weights.
      layers: how far `{layer}` runs.
      ties: targets that share another target's tensor (tied embeddings); a file's own copy of one
        must be equal to the other.
      allow_unmapped: tensors that no entry knows are listed, not refused.

    Raises:
      CheckpointMismatchError: with every problem found.
      MapError: an entry's transforms make another shape than the parameter's.
    """
    sources, problems = convert(index.records, weight_map.conversions)
    work = _Work(
        weight_map.file,
        weight_map.expand(layers),
        {(spec.module, spec.param): spec for spec in specs},
        ties or {},
        weight_map.zeros(layers),
        layout,
        problems=problems,
    )
    for source in sources:
        work.assign(source)
    work.compare_ties()
    for key, spec in work.specs.items():
        work.bind(key, spec)
    if not allow_unmapped:
        work.problems += [_unmapped(source) for source in work.unmapped]
    if work.problems:
        raise CheckpointMismatchError(work.problems)
    return Resolution(
        tuple(work.bindings),
        tuple(work.comparisons),
        tuple(work.skipped),
        tuple(source.name for source in work.unmapped),
    )


@dataclass
class _Work:
    """The tables that one `resolve` fills."""

    map_file: str
    entries: Mapping[str, Target | None]
    specs: Mapping[TargetKey, ParamSpec]
    ties: Mapping[TargetKey, TargetKey]
    zeros: frozenset[TargetKey]
    layout: Layout
    sources: dict[TargetKey, list[tuple[Source, Target]]] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unmapped: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[TargetKey, str]:
        """The tensor name that the map gives each target."""
        return {(t.module, t.param): name for name, t in self.entries.items() if t is not None}

    def assign(self, source: Source) -> None:
        """Files one tensor under the target that the map gives it."""
        name = match_name(source.name, self.entries)
        if name is None:
            self.unmapped.append(source)
            return
        target = self.entries[name]
        if target is None:
            self.skipped.append(source.name)
            return
        key = (target.module, target.param)
        if key not in self.specs and key not in self.ties:
            what = "the model that config.json describes has no such parameter"
            self.problems.append(_problem(what, source, key))
            return
        self.sources.setdefault(key, []).append((source, target))

    def compare_ties(self) -> None:
        """Turns a file's copies of tied parameters into comparisons."""
        for key, original_key in self.ties.items():
            for copy, _ in self.sources.get(key, []):
                for original, _ in self.sources.get(original_key, []):
                    pair = Comparison(copy.view.records[0], original.view.records[0])
                    self.comparisons.append(pair)
                    self._check_alike(pair, copy, key)

    def _check_alike(self, pair: Comparison, source: Source, key: TargetKey) -> None:
        copy, original = pair.copy, pair.original
        if (copy.shape, copy.dtype) != (original.shape, original.dtype):
            what = f"config.json ties this tensor to {original.name}, and they differ"
            expected = f"{original.dtype} {list(original.shape)}"
            found = f"{copy.dtype} {list(copy.shape)}"
            self.problems.append(_problem(what, source, key, expected, found))

    def bind(self, key: TargetKey, spec: ParamSpec) -> None:
        """Makes the view of one parameter, or says why there is none."""
        match self.sources.get(key, []):
            case [(source, target)]:
                self._bind_one(spec, source, target)
            case [] if key in self.zeros:
                self.bindings.append(Binding(spec, zeros(spec.shape)))
            case []:
                self.problems.append(self._unfilled(key))
            case many:
                names = ", ".join(source.name for source, _ in many)
                what = "two tensors for one parameter"
                self.problems.append(Problem(what, target=" ".join(key), found=names))

    def _bind_one(self, spec: ParamSpec, source: Source, target: Target) -> None:
        if problem := self._misfit(spec, source, target):
            self.problems.append(problem)
            return
        view = self.layout.apply(source.view, spec, target.transforms)
        if view.shape not in (spec.shape, spec.axis_sizes):
            raise MapError(
                "the map's transforms do not make the parameter's shape",
                file=self.map_file,
                tensor=source.name,
                key=f"{spec.module} {spec.param}",
                expected=list(spec.shape),
                found=list(view.shape),
            )
        self.bindings.append(Binding(spec, view, "divide_by_shards" in target.transforms))

    def _misfit(self, spec: ParamSpec, source: Source, target: Target) -> Problem | None:
        """What keeps a tensor from filling its parameter."""
        key = (spec.module, spec.param)
        if unknown := [name for name in source.dtypes if name not in dtypes.WEIGHT_DTYPES]:
            known = ", ".join(dtypes.WEIGHT_DTYPES)
            return _problem("this dtype cannot be loaded", source, key, known, unknown[0])
        if len(source.dtypes) > 1:
            what, found = "the parts of one parameter differ in dtype", ", ".join(source.dtypes)
            return _problem(what, source, key, "one dtype", found)
        if unfit := self.layout.unfit(spec, target.transforms):
            what = "the map gives a transform that does not fit the parameter"
            return _problem(what, source, key, found=unfit)
        expected, shape = self.layout.file_shape(spec, target.transforms), source.view.shape
        if shape != expected:
            what = "the shape does not fit the model that config.json describes"
            return _problem(what, source, key, str(list(expected)), str(list(shape)))
        return None

    def _unfilled(self, key: TargetKey) -> Problem:
        if key in self.names:
            what = "the checkpoint has no tensor for a parameter of the model"
            return Problem(what, tensor=self.names[key], target=" ".join(key))
        return Problem("the map has no entry for a parameter of the model", target=" ".join(key))


def match_name(name: str, entries: Container[str]) -> str | None:
    """The entry's name that a tensor's name means: exact, or but for one known base prefix.

    Published files carry or drop the prefix of the base model; nothing else may differ.
    """
    return next((spelling for spelling in spellings(name) if spelling in entries), None)


def _problem(
    what: str,
    source: Source,
    key: TargetKey,
    expected: str | None = None,
    found: str | None = None,
) -> Problem:
    return Problem(what, source.file, source.name, " ".join(key), expected, found)


def _unmapped(source: Source) -> Problem:
    found = f"{source.dtypes[0]} {list(source.view.shape)}"
    what = "the map has no entry for this tensor"
    return Problem(what, source.file, source.name, found=found)
