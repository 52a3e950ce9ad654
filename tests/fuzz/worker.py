"""Runs a range of variants of one target and prints each outcome as a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

from tests.fuzz.variants import run_variant


def main(target: str, seed: int, numbers: range) -> None:
    """Runs the variants one after another."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    with tempfile.TemporaryDirectory(prefix="fuzz-xla-") as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for n in numbers:
            print(json.dumps([n, run_variant(target, seed, n).to_dict()]), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), range(*map(int, sys.argv[3:6])))
