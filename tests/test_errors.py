"""Messages of errors: all facts, in lines that nobody else can forge."""

from __future__ import annotations

import pytest

from mtj_loader.errors import (
    AdapterMismatchError,
    CheckpointMismatchError,
    FormatError,
    HostError,
    Problem,
)

EVIL = "\x1b[2J\r\nerror: forged\n  hint: forged\u202e\x9b\u2028"
SHOWN = r"\x1b[2J\r\nerror: forged\n  hint: forged\u202e\x9b\u2028"


def test_every_fact_is_a_line_of_its_own():
    error = FormatError(
        "bad", file="f", tensor="t", key="k", expected=1, found=[2], hint="do it again"
    )
    assert str(error).splitlines() == [
        "bad", "  file: f", "  tensor: t", "  key: k", "  expected: 1", "  found: [2]",
        "  hint: do it again",
    ]  # fmt: skip


@pytest.mark.parametrize("fact", ["file", "tensor", "key", "expected", "found", "hint"])
def test_facts_are_escaped(fact: str):
    assert str(FormatError("bad", **{fact: EVIL})) == f"bad\n  {fact}: {SHOWN}"


def test_what_is_escaped():
    assert str(FormatError(f"bad {EVIL}")) == f"bad {SHOWN}"


@pytest.mark.parametrize("kind", [CheckpointMismatchError, AdapterMismatchError])
def test_problems_are_escaped(kind: type):
    problem = Problem(*[EVIL] * 6)
    first, second = str(kind([problem])).splitlines()
    assert first.startswith("1 problem between ")
    assert second == (
        f"- {SHOWN}: file {SHOWN}, tensor {SHOWN}, target {SHOWN}, expected {SHOWN}, found {SHOWN}"
    )


def test_the_error_of_another_host_keeps_its_lines():
    inner = FormatError("bad", found=EVIL)
    error = HostError(f"host 1 failed in 'plan': {inner}")
    assert str(error) == f"host 1 failed in 'plan': bad\n  found: {SHOWN}"
    assert str(HostError("\x1b")) == r"\x1b"


def test_long_facts_are_shortened():
    text = str(FormatError("bad", found="x" * 3_000_000))
    assert text == f"bad\n  found: {'x' * 1000}… (3,000,000 characters)"
