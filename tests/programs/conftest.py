"""Programs that are saved must be compiled: JAX's compilation cache is off in these tests."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True, scope="package")
def no_compilation_cache() -> Iterator[None]:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting only once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
