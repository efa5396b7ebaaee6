"""However an answer is cut into pieces, what it says is the same, nothing of it is lost, and it costs what its length
costs."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.parsing.deepseek import SECTION as DEEPSEEK
from services.router.parsing.deepseek import SEPARATOR
from services.router.parsing.families import THINKING, TOOL_CALLS
from services.router.parsing.kimi_k2 import ARGUMENTS
from services.router.parsing.kimi_k2 import SECTION as KIMI
from tests.builders.parsing import parser, said
from tests.counts import count

BITS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>"),
    *("<function=now>", "</function>", "<parameter=a>", "<parameter=city>", "</parameter>", "<function="),
    *("<arg_key>", "city</arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "get_weather\n"),
    *(DEEPSEEK.open, DEEPSEEK.close, DEEPSEEK.call, DEEPSEEK.end_call, SEPARATOR, "```json\n", "```", "function"),
    *(KIMI.open, KIMI.close, KIMI.call, KIMI.end_call, ARGUMENTS, "functions.now:0"),
    *("<|start|>assistant", "<|channel|>final", "<|channel|>analysis", " to=functions.now", "<|message|>", "<|end|>"),
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
    *('{"name": "now", "arguments": {"a": [1, "\\"}"]}}', '{"name": "search", "parameters": {"q": "é🙂"}}'),
    *('{"arguments": {"z": 1}, "name": "now"}', '{"name": "now", "arguments": "{\\"b\\": 2}"}', 'now{"x": "\\\\"}'),
    *(
        '[now(a="世界", b=[1, {"c": null}]), ',
        "search(q='🙂\\'')]",
        "[now()]",
        "<|python_start|>",
        "<|python_end|>",
        "(",
        ")",
        "=",
    ),
    *('{"name": "now"', ', "arguments": ', '{"a": ', '"\\u00', "7}", "}", "]", "[", '"', "\\", ";", ",", " ", "\n"),
    *("Hello", "世界", "🙂", "<", "</", "<|", "[T", "now"),
]
WORDS = ("世界", "🙂")
TEXTS = st.lists(st.sampled_from(BITS), max_size=14).map("".join)
FAMILIES = [(tools, thinking) for tools in ("", *TOOL_CALLS) for thinking in ("", *THINKING)]


@pytest.mark.parametrize(("tools", "thinking"), FAMILIES)
def test_the_cuts_of_an_answer_change_nothing(tools, thinking):
    @settings(max_examples=count("cut_answers"), deadline=None, database=None)
    @given(TEXTS, st.data(), st.sampled_from(["", "<think>\n", "</think>\n\n"]), st.booleans())
    def check(text, data, tail, parallel):
        how = {"tools": tools, "thinking": thinking, "prompt_tail": tail, "parallel": parallel}
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
        pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        whole = said([text], **how)
        assert said(pieces, **how) == said(list(text), **how) == whole
        if parallel:
            told = whole.content + whole.reasoning + "".join(arguments for _, arguments in whole.calls)
            assert [told.count(word) for word in WORDS] == [text.count(word) for word in WORDS]

    check()


@pytest.mark.parametrize(
    ("tools", "thinking", "piece"),
    [
        ("hermes", "qwen3", "<tool_call>{"),
        ("hermes", "", '<tool_call>{"arguments": "'),
        ("hermes", "", '<tool_call>{"name": "now", "arguments": {"a": "'),
        ("hermes", "deepseek_r1", "</"),
        ("hermes", "", "\n"),
        ("hermes", "", "<"),
        ("llama3_json", "", '{"name": "'),
        ("llama3_json", "", "; "),
        ("mistral", "", "[TOOL_CALLS] ["),
        ("mistral", "mistral", "[TOOL_CALLS]now"),
        ("mistral", "", "\\"),
        ("pythonic", "", "["),
        ("qwen3_coder", "", "<tool_call><function=now><parameter=a>1"),
        ("qwen3_coder", "", "<function=get_weather><parameter=city>\n"),
        ("qwen3_coder", "", "<tool_call><function=now><parameter=a>\n1\n</parameter></function>"),
        ("glm45", "", "<tool_call>now<arg_key>a"),
        ("glm45", "", "<tool_call>get_weather<arg_key>city</arg_key><arg_value></"),
        ("glm45", "", "<tool_call>now<arg_key>a</arg_key><arg_value>[</arg_value>"),
        ("deepseek_v3", "deepseek_r1", DEEPSEEK.open + DEEPSEEK.call),
        ("deepseek_v3", "", DEEPSEEK.open + DEEPSEEK.call + "function" + SEPARATOR + "now\n```json\n{"),
        ("kimi_k2", "", KIMI.open + KIMI.call + "functions.now:0"),
        ("openai", "openai_gptoss", "<|channel|>"),
        ("openai", "openai_gptoss", "<|channel|>analysis<|message|>a<|end|><|start|>assistant"),
        ("openai", "", "<|channel|>commentary to=functions.now<|message|>{"),
        ("kimi_k2", "", KIMI.open + KIMI.call + "functions.now:0" + ARGUMENTS + "{}" + KIMI.end_call),
        ("pythonic", "", "[now(a='"),
        ("pythonic", "", "[now([{("),
    ],
)
def test_the_cost_of_an_answer_grows_with_its_length_alone(tools, thinking, piece):
    def seconds(length):
        one, began = parser(tools, thinking), time.process_time()
        one.push(piece)
        for at in range(length):
            one.push(piece[at % len(piece)])
        one.finish()
        return time.process_time() - began

    short = min(seconds(1_000) for _ in range(3))
    assert seconds(32_000) < 128 * short + 0.05
