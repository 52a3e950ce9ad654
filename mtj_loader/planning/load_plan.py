"""The load plan with its outputs: text for people, JSON types for programs, shapes for JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader import display
from mtj_loader.planning import compile_for
from mtj_loader.planning.compiled_fit import CompiledFit
from mtj_loader.planning.plan_data import PlanData
from mtj_loader.planning.summary import tables
from mtj_loader.planning.tpu_fit import cache_bytes_per_token, fits


@dataclass(frozen=True)
class LoadPlan(PlanData):
    """A checkpoint, a model and a mesh brought together; see `PlanData` for the attributes."""

    def __repr__(self) -> str:
        return f"<LoadPlan of {self.headline}>"

    def compile_for(
        self,
        names: str | Sequence[str],
        *,
        slots: int = 1,
        context: int | None = None,
        search: bool = True,
        limit_seconds: float = compile_for.LIMIT_SECONDS,
    ) -> tuple[CompiledFit, ...]:
        """Compiles the model's programs for Cloud TPU slices; needs libtpu, but no TPU.

        The slices are compiled one after another, each in a child process.

        Args:
          names: slices, such as "v5e-8" or ["v3-8", "v5e-8"]. As many shards as the slice and the
            model allow are used; the plan's own mesh does not matter.
          slots: sequences at a time, over all replicas.
          context: tokens that each slot has room for; by default 2,048, or the model's context.
          search: also find the longest context and the most slots that fit, which takes longer.
          limit_seconds: for one slice; its compiler is ended then.

        Raises:
          UsageError: there is no such slice, or slots or context are out of range.
          MachineError: libtpu is not installed.
        """
        return compile_for.compile_for(
            self, names, slots=slots, context=context, search=search, limit_seconds=limit_seconds
        )

    def summary(self, compiled: Sequence[CompiledFit] = ()) -> str:
        """The plan for people: facts, a table with the layers folded, which TPUs it fits, notes.

        Args:
          compiled: what `compile_for` returned; replaces estimates.
        """
        return display.as_text(tables(self, compiled))

    def to_dict(self, compiled: Sequence[CompiledFit] = ()) -> dict[str, object]:
        """The plan as JSON types; docs/json.md describes them.

        Parameters are listed one by one, in the order in which they are read.

        Args:
          compiled: what `compile_for` returned; replaces estimates.
        """
        files = self.checkpoint.index.files.values()
        tied = self.comparisons
        return {
            "location": self.checkpoint.location,
            "model_type": self.model_type,
            "map": self.map_file,
            "adapters": [adapter.location for adapter in self.adapters],
            "mesh": {
                "dp": self.topology.dp,
                "mp": self.topology.mp,
                "hosts": [list(row) for row in self.topology.hosts],
            },
            "options": self.options.to_dict(),
            "files": [{"name": file.path, "bytes": file.size_bytes} for file in files],
            "device_bytes": self.device_bytes,
            "cache_bytes_per_token": cache_bytes_per_token(self, self.shards),
            "fits": [fit.to_dict() for fit in fits(self, compiled)],
            "compiled": [fit.to_dict() for fit in compiled],
            "host_read_bytes": {str(host): count for host, count in self.bytes_of_hosts.items()},
            "host_received_bytes": {str(h): self.received_bytes(h) for h in self.topology.host_ids},
            "parameters": [param.to_dict() for param in self.params],
            "tied": [{"tensor": pair.copy.name, "equals": pair.original.name} for pair in tied],
            "skipped": list(self.skipped),
            "unmapped": list(self.unmapped),
            "ignored_settings": list(self.config.ignored_settings),
            "warnings": list(self.warnings),
        }

    def abstract_params(self, mesh: Mesh) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """The shapes, dtypes and shardings of the loaded parameters: `params[module][param]`."""
        sharding = NamedSharding(mesh, PartitionSpec("mp"))
        tree: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        for param in self.params:
            abstract = jax.ShapeDtypeStruct(param.array_shape, param.dtype, sharding=sharding)
            tree.setdefault(param.spec.path, {})[param.spec.param] = abstract
        return tree
