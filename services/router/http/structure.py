"""What an answer must look like, in the spellings of OpenAI (`response_format`) and of vLLM (`structured_outputs`, and
`guided_…` before)."""

import json
from typing import Any

import msgspec

from services.router.http.schema import Common, ResponseFormat
from services.router.limits import check_depth, invalid
from shared.outcome import refuse


class Structure(msgspec.Struct, frozen=True):
    """The field that asks for a structure, and what it asks for as structured.structured_of takes it; empty where none
    does."""

    field: str = ""
    given: dict[str, Any] = {}

    @property
    def params(self) -> dict[str, str]:
        """The client's name for what refusals name."""
        return {f"structured.{kind}": self.field for kind in self.given}


NOTHING = Structure()


def structure_of(request: Common) -> Structure:
    """Raises RefusedError."""
    found = _asked_for(request)
    if len(found) > 1:
        names = [field for field, _, _ in found]
        raise invalid(names[-1], f"{' and '.join(names)} exclude each other; send one of them")
    if not found:
        return NOTHING
    [(field, kind, value)] = found
    return Structure(field, {kind: _json_text(field, value) if kind == "json_schema" else value})


def _asked_for(request: Common) -> list[tuple[str, str, Any]]:
    """Every field that asks for one: its name, the kind of structure, the value."""
    found = []
    if request.response_format is not None:
        found += _by_format(request.response_format)
    outputs = request.structured_outputs
    if outputs is not None:
        found += [
            ("structured_outputs.json", "json_schema", outputs.json),
            ("structured_outputs.regex", "regex", outputs.regex),
            ("structured_outputs.choice", "choice", outputs.choice),
            ("structured_outputs.grammar", "grammar", outputs.grammar),
            ("structured_outputs.json_object", "json_object", outputs.json_object or None),
        ]
    found += [
        ("guided_json", "json_schema", request.guided_json),
        ("guided_regex", "regex", request.guided_regex),
        ("guided_choice", "choice", request.guided_choice),
        ("guided_grammar", "grammar", request.guided_grammar),
    ]
    return [one for one in found if one[2] is not None]


def _by_format(wanted: ResponseFormat) -> list[tuple[str, str, Any]]:
    match wanted.type:
        case "text":
            return []
        case "json_object":
            return [("response_format", "json_object", True)]
        case "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                raise invalid("response_format", 'json_schema needs {"name": …, "schema": …}')
            return [("response_format", "json_schema", wanted.json_schema.schema)]
    message = f"response_format: {wanted.type[:64]!r} is not served; text, json_object and json_schema are"
    raise refuse("unsupported", message, field="response_format")


def _json_text(field: str, schema: str | dict[str, Any]) -> str:
    """A schema as a text; many send it as one."""
    if isinstance(schema, str):
        return schema
    check_depth(field, schema)
    return json.dumps(schema, ensure_ascii=False)
