"""The child process that compiles for one slice: libtpu may crash or hang, and cannot be stopped.

Reads a request as JSON from stdin and writes a `CompiledFit` as JSON to stdout; see
`planning.compile_for`, which starts it.
"""

from __future__ import annotations

import json
import os
import sys

from mtj_loader.dtypes import parameter_dtype
from mtj_loader.models import family
from mtj_loader.planning.compile_for import Request
from mtj_loader.planning.planner import with_whole_experts
from mtj_loader.planning.tpu_targets import find_target
from mtj_loader.tpu_compiler.measure import Subject, measure


def main() -> None:
    """Answers one request."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libtpu prints to stdout
    request = Request(**json.load(sys.stdin))
    config = family(request.config["model_type"]).Config.read(request.config, file="config.json")
    if request.expert_parallel:
        config = with_whole_experts(config)
    subject = Subject(
        config,
        find_target(request.name),
        request.transposed_linear,
        parameter_dtype(request.dtype),
    )
    fit = measure(subject, request.slots, request.context, search=request.search)
    json.dump(fit.to_dict(), answer)
    answer.close()


if __name__ == "__main__":
    main()
