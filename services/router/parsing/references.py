"""JSON schemas that become parts of a larger document: what their references mean stays as it was."""

from collections.abc import Callable, Iterator
from typing import Any

DATA = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are no schemas, whatever they look like."""
MAPS = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose values are schemas by names of the author's."""
MAX_PLACE_CHARS = 2048
"""Of a place in a schema. Each reference may become one: without a bound a small text would become a huge one."""


class PlaceError(ValueError):
    """A part of a schema stands too deep, or under names that are too long, for references to it to be written."""


def moved(schema: Any, place: str) -> Any:
    """The schema as it stands at `place` (`#/…`) of a document. Its references to itself, to its `$id`s and to its
    anchors become JSON pointers from the document's root; the names themselves are left out, since other parts of the
    document may have the same. A reference to what is not in the schema stays as it is. Raises PlaceError."""
    places: dict[str, str] = {}
    for at, resource, part in _parts(schema, place, place):
        identity, anchor = part.get("$id"), part.get("$anchor")
        if isinstance(identity, str) and identity.startswith("#"):  # an anchor, as draft 7 spells it
            anchor = identity[1:]
        elif isinstance(identity, str):
            places.setdefault(identity.removesuffix("#"), at)
        if isinstance(anchor, str):
            places.setdefault(f"{resource} {anchor}", at)
    return _rewritten(schema, place, place, places)


def _parts(schema: Any, place: str, resource: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A schema and all within it: where each stands, and where that stands which its references begin from. Raises
    PlaceError."""
    if isinstance(schema, dict):
        if len(place) > MAX_PLACE_CHARS:
            raise PlaceError(f"the JSON pointer to a part of it exceeds {MAX_PLACE_CHARS} characters: {place[:64]}…")
        resource = _resource(schema, place, resource)
        yield place, resource, schema
        for key, value in schema.items():
            for step, part in _within(key, value):
                yield from _parts(part, place + step, resource)


def _within(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The schemas that are a keyword's value, each with the JSON pointer from the schema that has the keyword."""
    if key in DATA:
        return
    if key in MAPS and isinstance(value, dict):
        yield from ((f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", part) for name, part in value.items())
    elif isinstance(value, list):
        yield from ((f"/{key}/{number}", part) for number, part in enumerate(value))
    else:
        yield f"/{key}", value


def _resource(schema: dict[str, Any], place: str, resource: str) -> str:
    identity = schema.get("$id")
    return place if isinstance(identity, str) and not identity.startswith("#") else resource


def _rewritten(schema: Any, place: str, resource: str, places: dict[str, str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    resource = _resource(schema, place, resource)
    told = {}
    for key, value in schema.items():
        if key in ("$id", "$anchor") and isinstance(value, str):
            continue
        parts = [_rewritten(part, place + step, resource, places) for step, part in _within(key, value)]
        told[key] = _like(value, parts, key)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        told["$ref"] = _target(reference, resource, places.get)
    return told


def _like(value: Any, parts: list[Any], key: str) -> Any:
    """A keyword's value with other schemas in it."""
    if key in DATA:
        return value
    if key in MAPS and isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    return parts if isinstance(value, list) else parts[0]


def _target(reference: str, resource: str, place_of: Callable[[str], str | None]) -> str:
    base, _, fragment = reference.partition("#")
    within = place_of(base) if base else resource
    if within is None:
        return reference
    if not fragment or fragment.startswith("/"):
        return within + fragment
    return place_of(f"{within} {fragment}") or reference
