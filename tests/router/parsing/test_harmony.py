"""Answers of gpt-oss, in the format that OpenAI documents as harmony: reasoning, text and calls are messages."""

import pytest

from tests.builders.parsing import Said, parser, said

TAIL = "<|start|>assistant"
BOTH = {"tools": "openai", "thinking": "openai_gptoss", "prompt_tail": TAIL}
THOUGHT = "<|channel|>analysis<|message|>Hm, <b>?\n<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>It is.\n"
PARIS = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + '{"city": "Paris"}'


def told(text: str, **how: str) -> Said:
    """The same however it comes."""
    whole = said([text], **how)
    assert said(list(text), **how) == whole
    for at in range(len(text)):
        assert said([text[:at], text[at:]], **how) == whole
    return whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT + FINAL, Said("It is.\n", "Hm, <b>?")),
        (FINAL, Said("It is.\n")),
        (THOUGHT + PARIS, Said(reasoning="Hm, <b>?", calls=[("get_weather", '{"city": "Paris"}')])),
        (PARIS + "<|call|>", Said(calls=[("get_weather", '{"city": "Paris"}')])),
        (PARIS.replace(" <|constrain|>", " "), Said(calls=[("get_weather", '{"city": "Paris"}')])),
        (" to=functions.now<|channel|>commentary json<|message|>{}", Said(calls=[("now", "{}")])),
        ("<|channel|>commentary to=functions.now<|message|><|call|>", Said(calls=[("now", "{}")])),
        (f"{PARIS}<|call|>{TAIL}{PARIS}", Said(calls=[("get_weather", '{"city": "Paris"}')] * 2)),
        (f"<|channel|>commentary<|message|>First.<|end|>{TAIL}{PARIS}",
         Said("First.", calls=[("get_weather", '{"city": "Paris"}')])),
        ("<|channel|>analysis to=python code<|message|>print(1)<|call|>", Said(reasoning="print(1)")),
        ("<|channel|>analysis<|message|>Hm", Said(reasoning="Hm")),
        (PARIS[:-5], Said(calls=[("get_weather", '{"city": "Pa')])),
    ],
)  # fmt: skip
def test_messages_are_told_apart_by_their_headers(text, expected):
    assert told(text, **BOTH) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Plain <b> text.\n",
        "to=functions.now",
        "<|channel|>",
        "<|channel|>analysis",
        "<|channel|>analysis<|mess",
        "<|channel|>secret<|message|>x",
        "<|channel|>final<|channel|>final<|message|>x",
        "Look: <|start|>user<|message|>x",
        "<|channel|>commentary to=functions.now",
    ],
)
def test_what_is_no_message_is_content_with_its_marks(text):
    assert told(text, **BOTH) == Said(text)


def test_where_no_tools_are_offered_a_call_is_content():
    text = THOUGHT + PARIS
    assert told(text, thinking="openai_gptoss") == Said('{"city": "Paris"}', "Hm, <b>?")


def test_messages_are_told_apart_where_only_calls_are_looked_for():
    assert told(THOUGHT + PARIS, tools="openai") == told(THOUGHT + PARIS, **BOTH)


def test_messages_are_told_while_they_come():
    one, so_far = parser("openai", "openai_gptoss"), Said()
    for piece, expected in [
        ("<|channel|>analysis<|message|>Hm", Said(reasoning="Hm")),
        (", so<|end|><|start|>", Said(reasoning="Hm, so")),
        ("assistant" + PARIS[:-5], Said(reasoning="Hm, so", calls=[("get_weather", '{"city": "Pa')])),
    ]:
        so_far.add(one.push(piece))
        assert so_far == expected
