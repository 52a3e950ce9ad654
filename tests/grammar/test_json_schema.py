"""JSON schemas: outputs under the mask are documents that the jsonschema package accepts."""

from __future__ import annotations

import json

import jsonschema
import pytest

from mtj_loader.errors import GrammarError
from tests.support.grammars import accepts, compile_schema, walk

SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
            "alive": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choice": {"anyOf": [{"const": {"x": [1, 2]}}, {"type": "number", "exclusiveMaximum": 10}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "anything": True,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_are_valid_documents(name: str) -> None:
    schema = SCHEMAS[name]
    grammar = compile_schema(schema)
    complete = 0
    for seed in range(60):
        output = walk(grammar, seed, max_tokens=80)
        if output.complete:
            complete += 1
            jsonschema.validate(json.loads(output.text), schema)
    assert complete > 2


def test_a_schema_may_be_given_as_json() -> None:
    grammar = compile_schema(json.dumps(SCHEMAS["pattern"]))
    assert accepts(grammar, '"AB-123"')
    assert not accepts(grammar, '"AB-"')


def test_white_space_is_bounded() -> None:
    grammar = compile_schema({"type": "array", "items": {"type": "integer"}})
    assert accepts(grammar, "[\n" + " " * 40 + "1,\t2 ]")
    assert not accepts(grammar, "[" + " " * 100 + "1]")
    assert not accepts(grammar, " [1]")


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ("{", "not valid JSON"),
        ('{"type": "object", "type": "string"}', "duplicate key"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("1", "not a JSON schema"),
        (False, "not a JSON schema"),
        ([], "not a JSON schema"),
        ({"const": {1, 2}}, "not JSON"),
        ({"const": float("nan")}, "not a finite number"),
        ({"enum": ["x" * 300_000]}, "too large"),
        ({"$ref": "https://127.0.0.1/schema.json"}, "another document"),
        ({"items": {"$ref": "other.json#/a"}}, "another document"),
        ({"x-guidance": {"lenient": True}}, "options of llguidance"),
        ({"$ref": "#/$defs/missing"}, "llguidance rejects"),
        ({"type": "strin"}, "llguidance rejects"),
        ({"type": "string", "pattern": "("}, "llguidance rejects"),
        ({"type": "string", "pattern": "(?=a)b"}, "llguidance rejects"),
        ({"not": {"type": "string"}}, "llguidance rejects"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "llguidance rejects"),
    ],
)
def test_bad_schemas_are_refused(schema: object, what: str) -> None:
    with pytest.raises(GrammarError, match=what):
        compile_schema(schema)


def test_a_reference_to_itself_has_no_document() -> None:
    grammar = compile_schema({"$ref": "#"})
    with pytest.raises(GrammarError, match="cannot be followed"):
        walk(grammar, 0)


def test_a_schema_deeper_than_python_recurses_is_refused() -> None:
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError):
        compile_schema(schema)
