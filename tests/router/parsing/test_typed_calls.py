"""Calls whose arguments are bare text, as the chat templates of Qwen3-Coder-30B-A3B-Instruct and of GLM-4.5 write them:
the tools' schemas say what is a string and what is not."""

import json

import pytest

from tests.builders.parsing import Said, parser, said

STRING = {"type": "string"}
TOOLS = {
    "write": {"properties": {"path": STRING, "text": STRING, "mode": {"anyOf": [STRING, {"type": "null"}]}}},
    "count": {
        "properties": {
            "n": {"type": "integer"},
            "x": {"type": ["number", "null"]},
            "all": {"type": "boolean"},
            "of": {"type": "array"},
            "by": {"oneOf": [{"type": "object"}, {}]},
        }
    },
    "now": {},
    "odd": {"properties": ["no", "schemas"], "type": 7},
}


def qwen(name: str, **given: str) -> str:
    each = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())
    return f"<tool_call>\n<function={name}>\n{each}</function>\n</tool_call>"


def glm(name: str, **given: str) -> str:
    each = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in given.items())
    return f"<tool_call>{name}\n{each}</tool_call>"


def glm_on_one_line(name: str, **given: str) -> str:
    return glm(name, **given).replace("\n", "")


FORMS = [("qwen3_coder", qwen), ("glm45", glm), ("glm45", glm_on_one_line)]
every_form = pytest.mark.parametrize(("family", "form"), FORMS)


def told(text: str, family: str) -> Said:
    """The same however it comes."""
    whole = said([text], tools=family, schemas=TOOLS)
    assert said(list(text), tools=family, schemas=TOOLS) == whole
    for at in range(0, len(text), 1 + len(text) // 500):
        assert said([text[:at], text[at:]], tools=family, schemas=TOOLS) == whole
    return whole


@every_form
@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("path", "/tmp/a b.txt", "/tmp/a b.txt"),
        ("path", "12", "12"),
        ("path", "", ""),
        ("path", '"quoted" \\ {"a": 1}', '"quoted" \\ {"a": 1}'),
        ("text", "東京 🙂 <b>&amp;</b> </param </arg <tool_call>", "東京 🙂 <b>&amp;</b> </param </arg <tool_call>"),
        ("mode", "null", None),
        ("mode", "w", "w"),
        ("mode", "7", "7"),
        ("n", "12", 12),
        ("n", " -3 ", -3),
        ("n", "12.0", 12.0),
        ("n", "12.5", "12.5"),
        ("n", "true", "true"),
        ("n", "many", "many"),
        ("x", "1e3", 1000.0),
        ("x", "None", None),
        ("x", "NaN", "NaN"),
        ("x", "1" * 5000, "1" * 5000),
        ("all", "True", True),
        ("all", "false", False),
        ("all", "0", "0"),
        ("of", '[1, {"a": ["b"]}]', [1, {"a": ["b"]}]),
        ("of", "[" * 5000, "[" * 5000),
        ("by", '{"é": "\\u00e9"}', {"é": "é"}),
        ("by", "plain", "plain"),
        ("unknown", "5", 5),
        ("unknown", "five", "five"),
    ],
)
def test_an_argument_is_what_its_schema_says(family, form, key, written, meant):
    name = "write" if key in ("path", "text", "mode") else "count"
    [(called, arguments)] = told(form(name, **{key: written}), family).calls
    assert called == name
    assert json.loads(arguments) == {key: meant}
    assert type(json.loads(arguments)[key]) is type(meant)


@pytest.mark.parametrize("family_form", FORMS[:2])
def test_lines_of_a_string_are_its_own(family_form):
    family, form = family_form
    code = "\n\ndef f():\n\treturn 1\n\n"
    [(_, arguments)] = told(form("write", path="a", text=code), family).calls
    assert json.loads(arguments) == {"path": "a", "text": code}


@every_form
def test_calls_follow_one_another_between_text(family, form):
    text = f"Both.\n\n{form('now')}\nThen\n{form('count', n='1', all='false')}\n{form('odd', no='1')}\n"
    calls = [("now", "{}"), ("count", '{"n": 1, "all": false}'), ("odd", '{"no": 1}')]
    assert told(text, family) == Said("Both.\nThen", calls=calls)


@every_form
def test_a_tool_that_is_not_known_may_be_called_between_marks(family, form):
    assert told(form("other.tool", a="1"), family) == Said(calls=[("other.tool", '{"a": 1}')])


def test_qwen_may_leave_marks_out():
    call = "<function=now>\n<parameter=a>\nb\n</parameter>\n"
    expected = Said(calls=[("now", '{"a": "b"}')])
    assert told(call + "</function>", "qwen3_coder") == expected
    assert told(call + "</function>\n</tool_call>", "qwen3_coder") == expected
    assert told("<tool_call>" + call + "</tool_call>", "qwen3_coder") == expected
    assert told("<tool_call><function=now><parameter=a>b</parameter></function></tool_call>", "qwen3_coder") == expected
    text = "It writes <function=f></function>."
    assert told(text, "qwen3_coder") == Said(text)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen3_coder", "<tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=now"),
        ("qwen3_coder", "<tool_call>\n<function=>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=a b>\n</function>\n</tool_call>"),
        ("qwen3_coder", f"<tool_call><function={'x' * 129}></function></tool_call>"),
        ("qwen3_coder", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
        ("qwen3_coder", "<parameter=a>\n1\n</parameter>"),
        ("glm45", "<tool_call>"),
        ("glm45", "<tool_call>now"),
        ("glm45", "<tool_call>now\n"),
        ("glm45", "<tool_call>now then</tool_call>"),
        ("glm45", "<tool_call></tool_call>"),
        ("glm45", "<tool_call><arg_key>a</arg_key><arg_value>b</arg_value></tool_call>"),
        ("glm45", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
        ("glm45", "<arg_key>a</arg_key>"),
    ],
)
def test_what_only_looks_like_a_call_is_content_with_its_marks(family, text):
    assert told(text, family) == Said(text)


@pytest.mark.parametrize(
    ("family", "text", "calls", "content"),
    [
        ("qwen3_coder", "<tool_call><function=now>oops</function>", [("now", "")], "oops</function>"),
        (
            "qwen3_coder",
            "<tool_call><function=write><parameter=path>a</parameter><parameter=>b</parameter>",
            [("write", '{"path": "a"')],
            "<parameter=>b</parameter>",
        ),
        ("glm45", "<tool_call>now<arg_key></arg_key>", [("now", "")], "</arg_key>"),
        (
            "glm45",
            "<tool_call>write<arg_key>path</arg_key><arg_value>a</arg_value><arg_key>text</arg_key>b</tool_call>",
            [("write", '{"path": "a"')],
            "<arg_key>text</arg_key>b",
        ),
    ],
)
def test_a_call_that_goes_wrong_keeps_arguments_that_are_not_whole_and_the_rest_is_content(
    family, text, calls, content
):
    assert told(text, family) == Said(content, calls=calls)


@every_form
def test_an_answer_cut_off_within_arguments_keeps_what_there_is(family, form):
    text = form("write", path="one", text="two")
    assert told(text[: text.index("wo")], family) == Said(calls=[("write", '{"path": "one", "text": "t')])
    text = form("count", n="123")
    assert told(text[: text.index("3")], family) == Said(calls=[("count", '{"n": 12')])


@every_form
def test_strings_are_told_while_they_come(family, form):
    text = form("write", text='a "b" c')
    one, so_far = parser(family, schemas=TOOLS), Said()
    so_far.add(one.push(text[: text.index("b")]))
    assert so_far.calls == [("write", '{"text": "a \\"')]
    so_far.add(one.push(text[text.index("b") : text.index(" c") + 1]))
    assert so_far.calls == [("write", '{"text": "a \\"b\\" ')]
