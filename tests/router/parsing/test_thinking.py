"""Reasoning is told apart from the answer, by the marks in the answer or those that the prompt has opened."""

import pytest

from tests.builders.parsing import Said, parser, said

THOUGHT = "\nThe user asks <b>.\n\nIf a < b: </thin\n"
TOLD = "The user asks <b>.\n\nIf a < b: </thin"


@pytest.mark.parametrize("family", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("text", "tail"),
    [
        (f"<think>{THOUGHT}</think>\n\n  It is.\n", "<|im_start|>assistant\n"),
        (f"\n\n<think>{THOUGHT}</think>\n  It is.\n", "assistant\n"),
        (f"{THOUGHT}</think>\n\n  It is.\n", "assistant\n<think>\n"),
        (f"<think>{THOUGHT}</think>\n\n  It is.\n", "assistant\n<think>\n"),
    ],
)
def test_reasoning_is_what_the_marks_enclose(family, text, tail):
    for pieces in ([text], list(text)):
        assert said(pieces, thinking=family, prompt_tail=tail) == Said("  It is.\n", TOLD)


def test_a_model_that_always_thinks_may_leave_the_first_mark_out():
    assert said(["Hm.\n</think>\nYes"], thinking="deepseek_r1") == Said("Yes", "Hm.")
    assert said(["Hm.\n</think>\nYes"], thinking="qwen3") == Said("Hm.\n</think>\nYes")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_r1"])
def test_an_answer_cut_off_while_thinking_is_reasoning(family):
    assert said(["<think>\nHm, </thi"], thinking=family) == Said(reasoning="Hm, </thi")
    assert said(["Hm"], thinking=family, prompt_tail="<think>\n") == Said(reasoning="Hm")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_r1"])
def test_a_prompt_that_closes_the_thoughts_leaves_none(family):
    text = "\n<think> is a tag.\n"
    assert said([text], thinking=family, prompt_tail="<think>\n\n</think>\n\n") == Said(text.lstrip("\n"))
    assert said(["Yes"], thinking=family, prompt_tail="<\uff5cAssistant\uff5c></think>") == Said("Yes")


def test_a_later_mark_is_content():
    text = "<think>a</think>Say <think>b</think>."
    assert said([text], thinking="qwen3") == Said("Say <think>b</think>.", "a")
    assert said(["Say <think>b</think>."], thinking="qwen3") == Said("Say <think>b</think>.")


def test_no_thoughts_are_no_reasoning():
    assert said(["<think>\n\n</think>\n\nYes"], thinking="qwen3") == Said("Yes")


def test_mistral_has_marks_of_its_own():
    assert said(["[THINK]a[/THINK]b"], thinking="mistral") == Said("b", "a")


def test_a_call_follows_thoughts_and_one_within_them_is_none():
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    text = f"<think>\nI could {call}.\n</think>\n\n{call}"
    expected = Said(reasoning=f"I could {call}.", calls=[("now", "{}")])
    assert said([text], tools="hermes", thinking="qwen3") == expected
    assert said(list(text), tools="hermes", thinking="qwen3") == expected


def test_text_flows_as_it_comes():
    one, told = parser(thinking="qwen3"), Said()
    for piece, reasoning, content in [
        ("<thi", "", ""),
        ("nk>\nHm", "Hm", ""),
        (", </", "Hm, ", ""),
        ("b> ", "Hm, </b> ", ""),
        ("\n</think", "Hm, </b> ", ""),
        (">\n\nYes\n", "Hm, </b> ", "Yes\n"),
    ]:
        told.add(one.push(piece))
        assert (told.reasoning, told.content) == (reasoning, content)
