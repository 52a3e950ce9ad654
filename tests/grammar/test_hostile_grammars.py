"""Grammars that try to take all time, memory or stack fail alone, and do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtj_loader.errors import GrammarError, MachineError
from mtj_loader.grammar import compile_grammar
from tests.support.grammars import compile_gbnf, compile_schema, walk


def chain_of_references(length: int) -> dict:
    """A schema in which each definition refers to the next one."""
    definitions = {
        f"d{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}}}
        for n in range(length)
    }
    return {"$defs": definitions | {f"d{length}": True}, "$ref": "#/$defs/d0"}


def nested_twice(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}, "additionalProperties": schema}
    return schema


HOSTILE_SCHEMAS = {
    "a large divisor": {"type": "integer", "multipleOf": 1_000_003},
    "a product of choices": {
        "allOf": [
            {"anyOf": [{"type": "object", "required": [f"{n}{m}"]} for m in range(6)]}
            for n in range(12)
        ]
    },
    "nested twice": nested_twice(12),
    "a divergent pattern": {
        "type": "string",
        "pattern": "(a|b)*a(a|b){30}c.*(a|b)*a(a|b){30}c",
        "minLength": 100,
    },
    "a cycle": {
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}},
        "$ref": "#/$defs/a",
    },
}


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_schemas_that_take_too_much_are_refused(name: str) -> None:
    with pytest.raises(GrammarError):
        compile_schema(HOSTILE_SCHEMAS[name])


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"{n:06d}" + "x" * 20 for n in range(8_000)]},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"},
        {"type": "object", "properties": {f"p{n}": {} for n in range(2_000)}},
        chain_of_references(3_000),
    ],
)
def test_large_schemas_are_compiled_or_refused(schema: dict) -> None:
    try:
        walk(compile_schema(schema), 0, max_tokens=5)
    except GrammarError:
        return


def chain_of_rules(body: str, end: str) -> str:
    rules = [body.replace("next", f"r{n + 1}").replace("this", f"r{n}") for n in range(990)]
    return "\n".join(["root ::= r0", *rules, f"r990 ::= {end}"])


@pytest.mark.parametrize(
    "grammar",
    [
        chain_of_rules("this ::= next next", '"a"'),
        chain_of_rules("this ::= next? next? next?", '"a"'),
        chain_of_rules('this ::= next "b" | "a"', "root"),
        "root ::= " + "(" * 25 + '"a"' + "{0,2000}){0,2000}" * 25,
        "root ::= " + "(" * 25 + '"a"' + ")*" * 25,
        'root ::= "' + "a" * 60_000 + '"',
        "root ::= " + "|".join(f'"{n}"' for n in range(9_000)),
    ],
)
def test_large_grammars_are_compiled_or_refused(grammar: str) -> None:
    try:
        walk(compile_gbnf(grammar), 0, max_tokens=5)
    except GrammarError:
        return


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= s\ns ::= s s s | s s | . | ""',
        "root ::= a\na ::= a b | b\nb ::= b a | .",
        "root ::= ([a-z]* | root){0,60}",
    ],
)
def test_ambiguous_grammars_are_refused_before_they_take_long(grammar: str) -> None:
    compiled = compile_gbnf(grammar, eos=())
    with pytest.raises(GrammarError, match="cannot be followed any further"):
        walk(compiled, 0, max_tokens=2_000, eos=())


@pytest.mark.parametrize(
    ("program", "error", "found"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", GrammarError, "SIGSEGV"),
        ("import time; time.sleep(60)", GrammarError, "no end after 0 s"),
        ("raise ValueError('broken')", MachineError, "broken"),
        ("import threading; threading.Thread(target=int, args='x').start()", MachineError, "'x'"),
    ],
)
def test_a_trial_that_ends_in_another_way_is_an_error(
    program: str,
    error: type[Exception],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(program)
    monkeypatch.setattr(compile_grammar, "_SCRIPT", script)
    monkeypatch.setattr(compile_grammar, "_WALL_SECONDS", 0.4 if "sleep" in program else 30.0)
    with pytest.raises(error, match=found):
        compile_gbnf('root ::= "not compiled before"')


def test_a_trial_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_grammar.sys, "executable", "/nonexistent/python")
    with pytest.raises(MachineError, match="cannot start a process"):
        compile_gbnf('root ::= "not compiled before"')
