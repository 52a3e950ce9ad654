"""Engines and generators of models, without the loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.generator import Generator
from mtj_loader.engine.runner import Engine, EngineSettings
from mtj_loader.engine.sizes import Sizes
from mtj_loader.generation.prompts import PromptRules


def make_generator(
    forward: Any,
    params: Any,
    rules: PromptRules,
    eos_ids: frozenset[int] = frozenset(),
    *,
    slots: int = 16,
    start: Sizes | None = None,
    queue_limit: int = 1000,
    check_memory: Callable[[Sizes], None] = lambda _: None,
    programs: Programs | None = None,
    threaded: bool = True,
) -> Generator:
    """A generator on an engine that grows up to `slots` slots in each group."""
    groups = forward.mesh.shape["dp"]
    limit = Sizes(groups, slots, rules.max_positions)
    settings = EngineSettings(start or Sizes(groups, 1, 1), limit, queue_limit)
    engine = Engine(
        programs or Programs(forward, params),
        params,
        settings,
        check_memory=check_memory,
        threaded=threaded,
    )
    return Generator(engine, rules, eos_ids, forward.frequencies)
