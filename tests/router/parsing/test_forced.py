"""Calls that a request demands: the schema that an answer is held to, and how such an answer is told."""

import json

import jsonschema
import pytest

from services.router.parsing.families import forced
from services.router.parsing.forced import schema_of_call, schema_of_calls
from services.router.parsing.parser import Parser, Parsing
from services.router.parsing.references import PlaceError
from shared.structured import Structured
from shared.text.grammar import check as grammar_check
from tests.builders.parsing import Said

TREE = {
    "type": "object",
    "properties": {"leaf": {"type": "integer"}, "left": {"$ref": "#"}, "unit": {"$ref": "#/$defs/unit"}},
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "grow", "parameters": TREE}},
]


def told(text: str, cuts: list[str], named: str = "") -> Said:
    calls = forced(None, named=bool(named))
    parser, found = Parser(Parsing(tool_calls=calls, tools={named: {}} if named else {}), ""), Said()
    for piece in cuts:
        found.add(parser.push(piece))
    found.add(parser.finish())
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"name": "now", "parameters": {}}]', Said(calls=[("now", "{}")])),
        (
            '[{"name":"grow","parameters":{"leaf":1}},{"name":"now","parameters":{"a":[]}}]',
            Said(calls=[("grow", '{"leaf":1}'), ("now", '{"a":[]}')]),
        ),
        ('[{"name": "grow", "parameters": {"le', Said(calls=[("grow", '{"le')])),
        ('[{"name": "grow", "par', Said('[{"name": "grow", "par')),
    ],
)
def test_demanded_calls_are_told_as_any_others(text, expected):
    assert told(text, [text]) == told(text, list(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"leaf": 1}', Said(calls=[("grow", '{"leaf": 1}')])), ('{"le', Said(calls=[("grow", '{"le')])), ("", Said())],
)
def test_of_the_one_named_tool_there_are_arguments_alone(text, expected):
    assert told(text, [text], "grow") == told(text, list(text), "grow") == expected


GOOD = [
    [{"name": "now", "parameters": {"any": "thing"}}],
    [{"name": "grow", "parameters": {"left": {"left": {"leaf": 1}, "unit": "C"}}}],
]
BAD = [
    [],
    {"name": "now", "parameters": {}},
    [{"name": "then", "parameters": {}}],
    [{"name": "now"}],
    [{"name": "now", "parameters": {}, "more": 1}],
    [{"name": "grow", "parameters": {"left": {"leaf": "x"}}}],
    [{"name": "grow", "parameters": {"unit": "K"}}],
    [{"name": "grow", "parameters": {"left": {"name": "now", "parameters": {}}}}],
]


def test_the_schema_takes_calls_of_the_tools_alone():
    check = jsonschema.Draft202012Validator(schema_of_calls(TOOLS, parallel=True))
    assert all(check.is_valid(calls) for calls in [*GOOD, [*GOOD[0], *GOOD[1]]])
    assert not any(check.is_valid(calls) for calls in BAD)
    single = jsonschema.Draft202012Validator(schema_of_calls(TOOLS, parallel=False))
    assert all(single.is_valid(calls) for calls in GOOD) and not single.is_valid([*GOOD[0], *GOOD[1]])


def test_the_schema_of_one_call_is_its_parameters():
    assert schema_of_call(TOOLS[1]) == TREE
    assert schema_of_call(TOOLS[0]) == {"type": "object"}


INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#node"}, "v": INTEGER}, "$anchor": "node"},
        {"$id": "http://x.test/node", "properties": {"next": {"$ref": "#"}, "v": INTEGER}},
        {"$id": "http://x.test/node", "properties": {"next": {"$ref": "http://x.test/node#"}, "v": INTEGER}},
        {"properties": {"next": {"$ref": "#n"}, "v": {"$ref": "#/$defs/v"}}, "$anchor": "n", "$defs": {"v": INTEGER}},
        {
            "properties": {"next": {"$ref": "inner"}, "v": INTEGER},
            "$defs": {"a/b": {"$id": "inner", "properties": {"next": {"$ref": "#"}, "v": {"$ref": "#/$defs/v"}},
                              "$defs": {"v": INTEGER}}},
        },
    ],
)  # fmt: skip
def test_references_by_name_mean_the_same_within_the_schema_of_calls(schema):
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("a", "b")]
    whole = schema_of_calls(tools, parallel=True)
    check = jsonschema.Draft202012Validator(whole)
    for name in ("a", "b"):
        assert check.is_valid([{"name": name, "parameters": {"next": {"next": {"v": 1}}}}])
        assert not check.is_valid([{"name": name, "parameters": {"next": {"next": {"v": "x"}}}}])
    grammar_check(Structured("json_schema", json.dumps(whole)))


@pytest.mark.parametrize(
    "part",
    [{"$id": "x", "anyOf": [{"$ref": "#"}] * 2000}, {"anyOf": [{"$anchor": f"a{at}"} for at in range(2000)]}],
    ids=["references", "anchors"],
)
def test_a_long_name_is_not_repeated_for_each_reference_below_it(part):
    def tool(name):
        return {"type": "function", "function": {"name": "f", "parameters": {"properties": {name: part}}}}

    with pytest.raises(PlaceError, match="exceeds 2048 characters: #/\\$defs/0/properties/kkk"):
        schema_of_calls([tool("k" * 20_000)], parallel=True)
    assert len(json.dumps(schema_of_calls([tool("k" * 200)], parallel=True))) < 2_000_000


def test_what_only_looks_like_a_reference_is_left_alone():
    data = {"$ref": "#", "$id": "x"}
    schema = {
        "properties": {
            "a": {"enum": [data], "default": data},
            "b": {"const": data, "examples": [data]},
            "enum": {"$ref": "#"},
            "$ref": {"type": "string"},
            "c": {"$ref": "#nowhere"},
        }
    }
    expected = json.loads(json.dumps(schema))
    expected["properties"]["enum"] = {"$ref": "#/$defs/0"}
    tool = {"type": "function", "function": {"name": "a", "parameters": schema}}
    assert schema_of_calls([tool], parallel=True)["$defs"]["0"] == expected
