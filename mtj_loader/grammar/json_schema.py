"""Reads JSON schemas that requests bring along, before llguidance compiles them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mtj_loader.errors import FormatError, GrammarError
from mtj_loader.formats import strict_json

_MAX_BYTES = 256 << 10  # a published schema of a whole API has about that
_OPTIONS = "x-guidance"  # llguidance's key for its own options

# White space is bounded, so that a model cannot write it forever; this is a line and 15 levels of
# four spaces. `lenient` would ignore what is not supported.
_MAX_SPACE = 61
_FIXED_OPTIONS = {
    "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{_MAX_SPACE}}}",
    "lenient": False,
}


def read_json_schema(schema: object) -> str:
    """Reads a schema, and sets llguidance's options in it.

    Args:
      schema: an object, or its JSON; True for a schema that any document matches.

    Returns:
      JSON for llguidance.

    Raises:
      GrammarError: not a schema, or it refers to another document. Other faults are found when the
        grammar is compiled.
    """
    document = _read_document(schema)
    for value in _walk(document):
        reference = value.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            what = "the schema refers to another document, and none is fetched"
            raise GrammarError(what, key="$ref", expected="#/…", found=reference)
    if _OPTIONS in document:
        raise GrammarError("options of llguidance are not supported in a schema", key=_OPTIONS)
    return json.dumps(document | {_OPTIONS: _FIXED_OPTIONS})


def _read_document(schema: object) -> dict[str, object]:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        document = strict_json.parse(text, file="json_schema", max_bytes=_MAX_BYTES)
    except FormatError as error:
        raise GrammarError(
            f"json_schema: {error.what}", key=error.key, expected=error.expected, found=error.found
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError("the schema is not JSON", key="json_schema", found=error) from error
    if document is True:
        return {}
    if not isinstance(document, dict):
        raise GrammarError(
            "not a JSON schema", key="json_schema", expected="an object or true", found=document
        )
    return document


def _walk(value: object) -> Iterator[dict[str, object]]:
    """All objects in a document."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield value
    for item in values:
        yield from _walk(item)
