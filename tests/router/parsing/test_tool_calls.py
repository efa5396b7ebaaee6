"""Answers in each family's published format, as its models write them, and as they go wrong."""

import json
import re

import pytest

from services.router.parsing.deepseek import SECTION as DEEP
from services.router.parsing.deepseek import SEPARATOR
from services.router.parsing.events import CallBegun
from services.router.parsing.families import TOOL_CALLS, ToolCalls, forced
from services.router.parsing.kimi_k2 import ARGUMENTS
from services.router.parsing.kimi_k2 import SECTION as KIMI
from services.router.parsing.parser import Parser, Parsing
from services.router.parsing.speaker import TOOL_NAME
from tests.builders.parsing import TOOLS, Said, parser, said

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


def deepseek_v3(*calls: tuple[str, str]) -> str:
    """As the chat template of DeepSeek-V3-0324 writes them."""
    each = (f"{DEEP.call}function{SEPARATOR}{name}\n```json\n{given}\n```{DEEP.end_call}" for name, given in calls)
    return DEEP.open + "\n".join(each) + DEEP.close


def deepseek_v31(*calls: tuple[str, str]) -> str:
    """As the chat template of DeepSeek-V3.1 writes them."""
    each = (f"{DEEP.call}{name}{SEPARATOR}{given}{DEEP.end_call}" for name, given in calls)
    return DEEP.open + "".join(each) + DEEP.close


def kimi(*calls: tuple[str, str]) -> str:
    """As docs/tool_call_guidance.md of Kimi-K2-Instruct has them."""
    each = (
        f"{KIMI.call}functions.{name}:{at}{ARGUMENTS}{given}{KIMI.end_call}" for at, (name, given) in enumerate(calls)
    )
    return KIMI.open + "".join(each) + KIMI.close


FORMATS = [
    *(("hermes", hermes), ("llama3_json", llama), ("mistral", listed), ("mistral", named), ("mistral", marked)),
    *(("deepseek_v3", deepseek_v3), ("deepseek_v31", deepseek_v31), ("kimi_k2", kimi)),
]


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
        ("deepseek_v3", f"{DEEP.open}{DEEP.call}function{SEPARATOR}now\n{{}}{DEEP.end_call}{DEEP.close}"),
        ("deepseek_v3", f"{DEEP.open}{DEEP.call}function{SEPARATOR}now\n```json\n[1]\n```{DEEP.end_call}{DEEP.close}"),
        ("deepseek_v31", f"{DEEP.open}{DEEP.call}not a name{SEPARATOR}{{}}{DEEP.end_call}{DEEP.close}"),
        ("deepseek_v31", f"{DEEP.open}{DEEP.close}"),
        ("deepseek_v31", f"{DEEP.call}now{SEPARATOR}{{}}{DEEP.end_call}"),
        ("kimi_k2", f"{KIMI.open}{KIMI.call}functions.now:0{ARGUMENTS}soon{KIMI.end_call}{KIMI.close}"),
        ("kimi_k2", f"{KIMI.open}{KIMI.call}functions.{'x' * 129}:0{ARGUMENTS}{{}}{KIMI.end_call}{KIMI.close}"),
        ("kimi_k2", f"{KIMI.open}{KIMI.call}functions.now:0{KIMI.end_call}{KIMI.close}"),
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
    ids = {TOOL_CALLS[family].new_id("now", at) for at in range(100)}
    assert len(ids) == 100
    form = {"mistral": "[a-zA-Z0-9]{9}", "kimi_k2": "functions[.]now:[0-9]+"}.get(family, "call_[0-9a-f]{24}")
    assert all(re.fullmatch(form, one) for one in ids)


def test_kimis_calls_keep_the_ids_that_the_model_gives_them():
    def ids(text: str, calls: ToolCalls) -> list[str]:
        one = Parser(Parsing(tool_calls=calls, tools=TOOLS), "")
        return [part.id for part in (*one.push(text), *one.finish()) if isinstance(part, CallBegun)]

    text = kimi(PARIS, ("now", "{}")).replace(":1", ":7")
    assert ids(text, TOOL_CALLS["kimi_k2"]) == ["functions.get_weather:0", "functions.now:7"]
    demanded = '[{"name": "now", "parameters": {}}]'
    assert ids(demanded, forced(TOOL_CALLS["kimi_k2"], named=False)) == ["functions.now:0"]
    bare = f"{KIMI.open}{KIMI.call}now{ARGUMENTS}{{}}{KIMI.end_call}{KIMI.close}"
    assert ids(bare, TOOL_CALLS["kimi_k2"]) == ["functions.now:0"]


@pytest.mark.parametrize(("family", "form"), [("deepseek_v3", deepseek_v3), ("kimi_k2", kimi)])
def test_a_good_call_before_a_bad_one_of_its_section_is_told(family, form):
    text = form(PARIS, ("now", "soon"))
    begin = text.index((DEEP if family == "deepseek_v3" else KIMI).call, 80)
    for pieces in ([text], list(text)):
        assert said(pieces, tools=family) == Said(text[begin:], calls=[PARIS])


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
@pytest.mark.parametrize("family", ["pythonic", "llama4_pythonic"])
def test_calls_written_in_python_are_told_as_json(text, calls, family):
    assert said([text], tools=family) == said(list(text), tools=family) == Said(calls=calls)


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
