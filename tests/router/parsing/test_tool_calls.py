"""Answers in each family's published format, as its models write them, and as they go wrong."""

import json

import pytest

from services.router.parsing.families import TOOL_CALLS
from services.router.parsing.speaker import TOOL_NAME
from tests.builders.parsing import Said, parser, said

PARIS = ("get_weather", '{"city": "Paris"}')
TOKYO = ("get_weather", '{"city": "東京", "unit": "celsius"}')
NESTED = (
    "search",
    '{"query": {"any": ["a \\"quoted\\" {brace}", "C:\\\\", "\\u00e9"], "deep": {"x": [[], {}]}}, "y": null}',
)
HELD = 'I will look. "Both" at once:'


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls
    )


def llama(*calls: tuple[str, str]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)


def listed(*calls: tuple[str, str]) -> str:
    inside = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
    return f"[TOOL_CALLS] [{inside}]"


def named(*calls: tuple[str, str]) -> str:
    return "".join(f"[TOOL_CALLS]{name}{arguments}" for name, arguments in calls)


def marked(*calls: tuple[str, str]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]a1B2c3D4e[ARGS]{arguments}" for name, arguments in calls)


FORMATS = [("hermes", hermes), ("llama3_json", llama), ("mistral", listed), ("mistral", named), ("mistral", marked)]


@pytest.mark.parametrize(("family", "form"), FORMATS)
@pytest.mark.parametrize("calls", [[PARIS], [PARIS, TOKYO], [NESTED], [TOKYO, NESTED, ("now", "{}")]])
def test_calls_are_told_with_their_arguments_as_the_model_wrote_them(family, form, calls):
    found = said([form(*calls)], tools=family)
    assert found == Said(calls=list(calls))
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in found.calls)


@pytest.mark.parametrize(("family", "form"), FORMATS)
def test_text_before_calls_is_content_without_the_space_between(family, form):
    opening = "<|python_tag|>" if family == "llama3_json" else ""
    found = said([HELD + "\n\n" + opening + form(PARIS, TOKYO) + "\n"], tools=family)
    assert found == Said(HELD, calls=[PARIS, TOKYO])


@pytest.mark.parametrize(("family", "form"), FORMATS)
def test_an_answer_cut_off_within_arguments_keeps_what_there_is(family, form):
    text = form(PARIS, NESTED)
    text = text[: text.index("brace")]
    name, arguments = NESTED
    assert said([text], tools=family) == Said(calls=[PARIS, (name, arguments[: arguments.index("brace")])])


@pytest.mark.parametrize(("family", "form"), FORMATS)
def test_an_answer_cut_off_before_arguments_is_content(family, form):
    text = form(PARIS)
    for stop in (len(text) - len(PARIS[1]) - len("}\n</tool_call>"), text.index("weather"), 3):
        cut = text[:stop] if '{"city' not in text[:stop] else text[: text.index('{"city')]
        assert said([cut], tools=family) == Said(cut)


@pytest.mark.parametrize("family", TOOL_CALLS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        " \n No call here. \n\n",
        "if a < b and [x] or {y}: <tool\n",
        '{"name": "Alice", "age": 7}',
        '{"name": "delete_all", "parameters": {}}',
        '{"city": "Paris"}\n',
        '["get_weather", {"city": 1}]',
        "<tool_call",
        "[TOOL_CALL] <|python_tag",
    ],
)
def test_an_answer_without_calls_arrives_as_it_is(family, text):
    assert said([text], tools=family) == Said(text)
    assert said(list(text), tools=family) == Said(text)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", '<tool_call>\n{"name": get_weather}\n</tool_call> sorry'),
        ("hermes", '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"city": "Paris"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "soon"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "a b\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>\nget_weather(Paris)\n</tool_call>\n"),
        ("llama3_json", '<|python_tag|>brave_search.call(query="weather")'),
        ("llama3_json", '{"name": "get_weather" "parameters": {}}'),
        ("llama3_json", '{"name": "get_weather", "parameters": 7}'),
        ("mistral", "[TOOL_CALLS] [get_weather]"),
        ("mistral", "[TOOL_CALLS]get weather{}"),
        ("mistral", "[TOOL_CALLS]get_weather[ARGS]Paris"),
        ("mistral", "[TOOL_CALLS] []"),
    ],
)
def test_what_only_looks_like_a_call_is_content_with_its_marks(family, text):
    assert said([text], tools=family) == Said(text)
    assert said(list(text), tools=family) == Said(text)


def test_a_good_call_behind_a_bad_one_is_told():
    bad = '<tool_call>\n{"name": oops}\n</tool_call>'
    assert said([bad + "\n" + hermes(PARIS)], tools="hermes") == Said(bad, calls=[PARIS])


def test_what_follows_a_call_within_its_block_is_content_and_the_mark_is_not():
    text = '<tool_call>{"name": "now", "arguments": {}}}</tool_call> done'
    assert said([text], tools="hermes") == Said("} done", calls=[("now", "{}")])


def test_text_between_and_behind_calls_is_content():
    text = f"One.\n{hermes(PARIS)}\nTwo.\n{hermes(TOKYO)}\n\nThree.\n"
    assert said([text], tools="hermes") == Said("One.\nTwo.\n\nThree.\n", calls=[PARIS, TOKYO])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"arguments": {"city": "Paris"}, "name": "get_weather"}', '{"city": "Paris"}'),
        ('{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}', '{"city": "Paris"}'),
        ('{"id": 7, "type": "function", "name": "get_weather", "arguments": {}, "strict": true }', "{}"),
        ('{"name": "get_weather"}', "{}"),
        ('{"name": "get_weather", "arguments": null}', "{}"),
    ],
)
def test_a_call_may_be_written_in_other_ways(written, arguments):
    text = f"<tool_call>{written}</tool_call>"
    assert said([text], tools="hermes") == said(list(text), tools="hermes") == Said(calls=[("get_weather", arguments)])


def test_arguments_are_told_while_they_come():
    one, told = parser("hermes"), Said()
    told.add(one.push('<tool_call>{"name": "get_weather", "arguments": {"ci'))
    assert told.calls == [("get_weather", '{"ci')]
    told.add(one.push('ty": "Par'))
    assert told.calls == [("get_weather", '{"city": "Par')]


def test_only_what_may_begin_a_mark_is_held_back():
    one, told = parser("hermes"), Said()
    told.add(one.push("a <tool"))
    assert told.content == "a"
    told.add(one.push("box> b"))
    assert told.content == "a <toolbox> b"


def test_without_parallel_calls_only_the_first_is_told():
    assert said([hermes(PARIS, TOKYO)], tools="hermes", parallel=False) == Said(calls=[PARIS])


@pytest.mark.parametrize("family", TOOL_CALLS)
def test_ids_are_unique_and_as_the_family_wants_them(family):
    ids = {TOOL_CALLS[family].new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(one.isalnum() and len(one) == 9 if family == "mistral" else one.startswith("call_") for one in ids)


def test_a_tool_may_have_any_name_that_is_a_word():
    assert TOOL_NAME.fullmatch("mcp__files.read-all:v2/x")
    assert not any(TOOL_NAME.fullmatch(name) for name in ("", "a b", "é", "x" * 129))


PYTHON = [
    ('[get_weather(city="Paris")]', [PARIS]),
    ("\n[ get_weather(city='Paris'), now() ]\n", [PARIS, ("now", "{}")]),
    (
        """[search(query={"any": ["a 'quoted' [bracket", 'C:\\\\', "é"], 'x': -1.5}, y=true, z=(1, None))]""",
        [
            (
                "search",
                '{"query": {"any": ["a \'quoted\' [bracket", "C:\\\\", "é"], "x": -1.5}, "y": true, "z": [1, null]}',
            )
        ],
    ),
    ('<|python_start|>[now(), get_weather(city="Paris")]<|python_end|>', [("now", "{}"), PARIS]),
]


@pytest.mark.parametrize(("text", "calls"), PYTHON)
def test_calls_written_in_python_are_told_as_json(text, calls):
    assert said([text], tools="pythonic") == said(list(text), tools="pythonic") == Said(calls=calls)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[now",
        "[now(",
        '[now(a="',
        "[now(1)]",
        "[now(**{})]",
        "[now(a=b)]",
        "[now(a=1e999)]",
        "[now(a='\\ud800')]",
        "[now(a=__import__('os').getcwd())]",
        "[now(), delete_all()]",
        "[now()](link)[",
        "[now(a=" + "-" * 30_000 + "1)]",
        "[now(a=" + "[" * 300 + "]" * 300 + ")]",
        "[now(a='" + "x" * 70_000 + "')]",
        "<|python_start|>print(1)<|python_end|>",
        "Look: [now()]",
    ],
)
def test_what_is_no_list_of_calls_in_python_is_content(text):
    expected = Said("(link)[", calls=[("now", "{}")]) if "link" in text else Said(text)
    assert said([text], tools="pythonic") == expected
