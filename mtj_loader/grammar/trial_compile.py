"""Compiles a grammar in a process of its own, to find out what that takes.

llguidance bounds the size of a grammar, but not the time and the stack that compiling takes, and a
thread that compiles cannot be stopped. A process can, and it may crash. Compiling is deterministic,
so what succeeds here succeeds in the caller's process, in about the same time.

Run as a script: limits of `LLParserLimits` as JSON in the first argument, the grammar on standard
input; prints llguidance's error as JSON. It imports nothing of mtj_loader, to start quickly.
"""

from __future__ import annotations

import json
import resource
import sys
import threading

import llguidance

_CPU_SECONDS = 2  # the largest real schemas take 1
_MEMORY_BYTES = 2 << 30  # address space; the interpreter and llguidance take 0.2 GB of it
_STACK_BYTES = 1 << 20  # an eighth of what threads of the caller have, so they have some to spare


def _compile() -> None:
    limits = llguidance.LLParserLimits(**json.loads(sys.argv[1]))
    tokenizer = llguidance.LLTokenizer("byte", slices=[])
    grammar = sys.stdin.buffer.read().decode()
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    sys.stdout.write(json.dumps(matcher.get_error()))


def main() -> None:
    """Compiles the grammar on standard input within the limits of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    if sys.platform == "linux":  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
