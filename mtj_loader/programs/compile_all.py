"""Compiling several programs at once: XLA compiles without the GIL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from jax.stages import Compiled, Lowered

from mtj_loader.programs.jax_private import compile_fresh, without_caches

# XLA uses two threads or more for each program.
_COMPILE_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))


def compile_all(
    programs: Mapping[str, Callable[[], Lowered]],
    done: Callable[[str, float], None] = lambda _name, _seconds: None,
) -> dict[str, Compiled]:
    """Traces programs one after another, and compiles up to four at once meanwhile.

    JAX's compilation cache is off in the whole process meanwhile: programs that were read from it
    cannot be saved.

    Args:
      programs: for each name a function that traces and lowers the program.
      done: gets the name of each compiled program and the seconds that XLA took; any thread calls
        it.

    Returns:
      The compiled programs, in the same order.

    Raises:
      Exception: the first error in the order of the programs, with a note that names the program.
        Programs that have not started are not compiled; running compilations are not awaited.
    """
    tracer = ThreadPoolExecutor(1, thread_name_prefix="mtj_loader_trace")
    compilers = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="mtj_loader_compile")
    with without_caches():
        try:
            jobs = {
                name: compilers.submit(_compile, name, tracer.submit(lower), done)
                for name, lower in programs.items()
            }
            return {name: _result(name, job) for name, job in jobs.items()}
        finally:  # XLA cannot be stopped: after an error or Ctrl-C, it ends by itself
            tracer.shutdown(wait=False, cancel_futures=True)
            compilers.shutdown(wait=False, cancel_futures=True)


def _compile(name: str, traced: Future[Lowered], done: Callable[[str, float], None]) -> Compiled:
    lowered, start = traced.result(), time.perf_counter()
    compiled = compile_fresh(lowered)
    done(name, time.perf_counter() - start)
    return compiled


def _result(name: str, job: Future[Compiled]) -> Compiled:
    try:
        return job.result()
    except Exception as error:
        error.add_note(f"while compiling the program {name!r}")
        raise
