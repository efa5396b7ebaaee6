"""JSON schemas drawn from a seed, of the kinds that people write: objects of bounded strings, numbers, enumerations,
lists, nested objects, alternatives and references."""

import random
from typing import Any

NAMES = ("name", "id", "kind", "value", "items", "path", "line", "doc", "é", "max count", "is_ok", "tags")
WORDS = ("red", "green", "blue", "open", "closed", "naïve", "a b", 'say "hi"', "x\\y", "line\nend")
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z][a-z]+( [a-z]+){0,3}$", "^v[0-9]{1,4}\\.[0-9]{1,2}$", "^(yes|no|maybe)$")
FORMATS = ("date", "uuid", "ipv4", "date-time")


def make_schema(seed: int) -> dict[str, Any]:
    """An object at the top. What has no bound, and where a model that likes to go on may do so for ever: further
    properties (an eighth of the schemas allow them), decimals (of a tenth of the numbers), fractions of a second."""
    rng = random.Random(f"schema {seed}")
    schema = _object(rng, depth=0, open_ended=rng.random() < 1 / 8)
    if rng.random() < 0.2:
        schema["$defs"] = {"part": _value(rng, depth=2)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
        schema.setdefault("required", []).append("part")
    return schema


def _object(rng: random.Random, depth: int, *, open_ended: bool = False) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 5 - depth))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
    }
    if not open_ended:
        schema["additionalProperties"] = False
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _string, _integer, _number, _enumeration, _plain]
    if depth < 3:
        kinds += [_list, lambda rng, depth: _object(rng, depth), _alternatives]
    return rng.choice(kinds)(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    shape = rng.randrange(4)
    if shape == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if shape == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.choice((0, 0, 1, 3))
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 40)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 10_000)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-50, 50)
    schema = {"type": "number", "minimum": least, "maximum": least + rng.randint(1, 500)}
    return schema if rng.random() < 0.1 else {**schema, "multipleOf": rng.choice((0.5, 0.25))}


def _enumeration(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = [*rng.sample(WORDS, rng.randint(1, 4)), rng.randint(0, 99), None]
    return {"enum": values} if rng.random() < 0.7 else {"const": rng.choice(values)}


def _plain(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(("boolean", "null"))}


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.choice((0, 0, 1, 2))
    return {"type": "array", "items": _value(rng, depth + 1), "minItems": least, "maxItems": least + rng.randint(1, 3)}


def _alternatives(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth + 1) for _ in range(rng.randint(2, 3))]}
