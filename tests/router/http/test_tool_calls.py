"""Tools and reasoning in /v1/chat/completions: what the template is given, what clients read, whole and streamed."""

import json
from typing import Any

import openai
import pytest

from services.router.parsing.forced import schema_of_calls
from tests.builders.http import events
from tests.builders.router import run
from tests.builders.saying import HELLO, Saying, saying
from tests.builders.tool_text import LLAMA3, MISTRAL, QWEN3, R1, TOOLS

PARIS = '{"city": "Paris \\"quoted\\" {é}"}'
CALLS = (
    f'Both.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
THOUGHT = "<think>\nThe user wants 天気.\n</think>\n\n"


def test_calls_are_told_whole_and_streamed(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            choice = await one.choice(THOUGHT + CALLS, tools=TOOLS)
            message = choice["message"]
            assert (choice["finish_reason"], message["content"]) == ("tool_calls", "Both.")
            assert message["reasoning"] == message["reasoning_content"] == "The user wants 天気."
            functions = [call["function"] for call in message["tool_calls"]]
            assert functions == [{"name": "get_weather", "arguments": PARIS}, {"name": "now", "arguments": "{}"}]
            assert {call["type"] for call in message["tool_calls"]} == {"function"}
            only = await one.choice(CALLS.removeprefix("Both.\n"), tools=TOOLS, parallel_tool_calls=False)
            assert only["message"]["content"] is None and len(only["message"]["tool_calls"]) == 1

    run(test())


def test_the_openai_client_puts_a_stream_of_calls_together(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            one.says = CALLS
            async with openai.AsyncOpenAI(base_url=one.base_url, api_key="none", max_retries=0) as client:
                ask: dict[str, Any] = {"model": "m", "messages": HELLO, "tools": TOOLS, "tool_choice": "auto"}
                whole = await client.chat.completions.create(**ask)
                async with client.chat.completions.stream(**ask) as stream:
                    kinds = {event.type async for event in stream}
                    streamed = await stream.get_final_completion()
                assert "tool_calls.function.arguments.delta" in kinds
                for message in (whole.choices[0].message, streamed.choices[0].message):
                    first, second = message.tool_calls or ()
                    assert (first.function.name, json.loads(first.function.arguments)) == (
                        "get_weather",
                        {"city": 'Paris "quoted" {é}'},
                    )
                    assert (second.function.name, second.function.arguments) == ("now", "{}")
                assert whole.choices[0].finish_reason == streamed.choices[0].finish_reason == "tool_calls"
                told = whole.choices[0].message.model_dump(exclude_none=True)
                results = [{"role": "tool", "tool_call_id": call["id"], "content": "21"} for call in told["tool_calls"]]
                one.says = "Sunny."
                last = await client.chat.completions.create(**ask | {"messages": [*HELLO, told, *results]})
            assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("Sunny.", "stop")

    run(test())


def test_the_template_is_given_tools_calls_results_and_reasoning(tmp_path):
    async def test():
        calls = [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"é"}'}}]
        messages = [
            *HELLO,
            {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21"}]},
        ]
        async with saying(tmp_path, QWEN3) as one:
            await one.post("", messages=messages, tools=TOOLS)
            system, conversation = one.prompt().split("<|im_end|>\n", 1)
            assert [
                json.loads(line) for line in system.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
            ] == TOOLS
            assert conversation == (
                "<|im_start|>user\nthe fox<|im_end|>\n"
                "<|im_start|>assistant\n<think>\nHm.\n</think>\n\n"
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "é"}}\n</tool_call><|im_end|>\n'
                "<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\n"
            )
            await one.post("", messages=messages, tools=TOOLS, tool_choice="none")
            assert "<tools>" not in one.prompt()
            counted = await one.client.post("/tokenize", json={"messages": messages, "tools": TOOLS})
            assert counted.json()["tokens"] == one.scheduler.requests[0].token_ids

    run(test())


def test_arguments_are_text_to_a_template_that_writes_them_out(tmp_path):
    async def test():
        async with saying(tmp_path, LLAMA3) as one:
            for sent in ('{"city":  "Paris"}', '{"city": "Par', "[1]"):
                calls = [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": sent}}]
                await one.post("", messages=[*HELLO, {"role": "assistant", "tool_calls": calls}])
                assert one.prompt() == f"<s>user: the foxassistant: <|python_tag|>{sent}assistant: "

    run(test())


@pytest.mark.parametrize(
    ("template", "text", "calls"),
    [
        (LLAMA3, '{"name": "now", "parameters": {"city": "é"}}', [("now", '{"city": "é"}')]),
        (LLAMA3, 'Wait.<|python_tag|>{"name": "now", "parameters": {}}', [("now", "{}")]),
        (MISTRAL, 'Wait.[TOOL_CALLS] [{"name": "now", "arguments": {"a": [1]}}]', [("now", '{"a": [1]}')]),
        (
            MISTRAL,
            '[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]now{}',
            [("now", '{"a": 1}'), ("now", "{}")],
        ),
    ],
)
def test_marks_that_are_special_tokens_are_understood_and_other_special_tokens_stay_hidden(
    tmp_path, template, text, calls
):
    async def test():
        async with saying(tmp_path, template) as one:
            message = (await one.choice(text, tools=TOOLS))["message"]
            assert [
                (call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]
            ] == calls
            assert message["content"] == ("Wait." if text.startswith("Wait.") else None)
            hidden = await one.choice("A<|other|>b", tools=TOOLS)
            assert hidden["message"]["content"] == "Ab"
            untold = await one.choice("A<|python_tag|>[TOOL_CALLS]b")
            assert untold["message"]["content"] == "Ab"

    run(test())


def test_arguments_that_are_bare_text_have_the_types_of_the_tools_schema(tmp_path):
    async def test():
        template = "{{ tools | tojson }}{{ messages[0].content }}<tool_call><function="
        says = "<tool_call>\n<function=get_weather>\n<parameter={}>\n12\n</parameter>\n</function>\n</tool_call>"
        async with saying(tmp_path, template) as one:
            for key, arguments in (("city", '{"city": "12"}'), ("days", '{"days": 12}')):
                choice = await one.choice(says.format(key), tools=TOOLS)
                [call] = choice["message"]["tool_calls"]
                assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
                assert call["function"] == {"name": "get_weather", "arguments": arguments}

    run(test())


def test_a_calls_id_is_the_models_own_where_it_has_one(tmp_path):
    async def test():
        template = "{{ tools | tojson }}{{ messages[0].content }}<|tool_calls_section_begin|>"
        says = (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:3<|tool_call_argument_begin|>{}"
            "<|tool_call_end|><|tool_calls_section_end|>"
        )
        async with saying(tmp_path, template) as one:
            [call] = (await one.choice(says, tools=TOOLS))["message"]["tool_calls"]
            assert (call["id"], call["function"]["name"]) == ("functions.now:3", "now")
            told = events((await one.post(says, tools=TOOLS, stream=True)).text)
            assert "functions.now:3" in json.dumps(told)

    run(test())


def test_an_answer_that_ends_by_length_keeps_the_arguments_so_far(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            says = CALLS[: CALLS.index(" {é}")]
            choice = await one.choice(says, ends=False, tools=TOOLS)
            assert choice["finish_reason"] == "length"
            [call] = choice["message"]["tool_calls"]
            assert call["function"]["arguments"] == PARIS[: PARIS.index(" {é}")]

    run(test())


@pytest.mark.parametrize("says", ["\n Plain.\n", "<tool_call>\n{oops}\n</tool_call>\n", "<tool_call", ""])
def test_an_answer_without_calls_is_content_and_ends_as_ever(tmp_path, says):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            choice = await one.choice(says, tools=TOOLS)
            assert (choice["message"]["content"], choice["finish_reason"]) == (says, "stop")
            assert "tool_calls" not in choice["message"] and "reasoning" not in choice["message"]
            untouched = await one.choice(CALLS, tools=TOOLS, tool_choice="none")
            assert untouched["message"]["content"] == CALLS

    run(test())


def test_reasoning_is_told_apart_unless_it_is_not_wanted(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            told = await one.choice(THOUGHT + "Yes\n")
            assert (told["message"]["reasoning_content"], told["message"]["content"]) == (
                "The user wants 天気.",
                "Yes\n",
            )
            kept = await one.choice(THOUGHT + "Yes", include_reasoning=False)
            assert "reasoning_content" not in kept["message"] and kept["message"]["content"] == "Yes"
            cut = await one.choice(THOUGHT[:20], ends=False)
            assert (cut["message"]["content"], cut["finish_reason"]) == (None, "length")
            none = await one.choice("<think> is a tag", chat_template_kwargs={"enable_thinking": False})
            assert none["message"]["content"] == "<think> is a tag"

    run(test())


def test_reasoning_that_the_prompt_has_opened_is_told_apart(tmp_path):
    async def test():
        async with saying(tmp_path, R1) as one:
            told = await one.choice("Hm.\n</think>\n\nYes")
            assert (told["message"]["reasoning"], told["message"]["content"]) == ("Hm.", "Yes")

    run(test())


def test_the_parsers_can_be_chosen_and_turned_off(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3, tool_call_parser="none", reasoning_parser="none") as one:
            plain = await one.choice(THOUGHT + CALLS)
            assert plain["message"]["content"] == THOUGHT + CALLS
            refused = await one.post("", tools=TOOLS, status=400)
            assert "--tool-call-parser" in refused.json()["error"]["message"]
            await one.post("", tools=TOOLS, tool_choice="none")
        async with saying(tmp_path, QWEN3, tool_call_parser="llama3_json") as one:
            call = await one.choice('{"name": "now", "parameters": {}}', tools=TOOLS)
            assert call["finish_reason"] == "tool_calls"

    run(test())


def test_every_token_of_a_parsed_stream_has_its_logprob_and_id(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            ask = {"tools": TOOLS, "return_token_ids": True, "stream_options": {"include_usage": True}, "n": 2}
            chunks = events((await one.post(CALLS, stream=True, **ask)).text)
            tokens = one.answer(None, 0)
            for index in range(2):
                choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
                assert [token for choice in choices for token in choice.get("token_ids", ())] == tokens
                assert sum("tool_calls" in choice["delta"] for choice in choices) > 2
            assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(tokens)

    run(test())


F = {"type": "function", "function": {"name": "f"}}


def taking(parameters: dict[str, Any]) -> dict[str, Any]:
    """A request that demands calls of a tool with these parameters."""
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


LARGE = {"description": "x" * 131072}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG = [
    ({"tools": 5}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [F, {"type": "function", "function": {}}]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [F, F]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]}, "tools[0].function.description"),
    ({"tools": [F] * 257}, "tools"),
    ({"tools": [F], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    (taking({"type": "thing"}), "tools"),
    (taking(LARGE), "tools"),
    ({**taking(LARGE), "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools"),
    (taking({"properties": {"k" * 4096: {"$ref": "#"}}}), "tools"),
    ({"tools": [F], "tool_choice": "required", "min_tokens": 5}, "min_tokens"),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    (
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL, {"function": {"name": 5}}]}]},
        "messages[1].tool_calls[1].function.name",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
]


def test_what_is_wrong_with_tools_and_calls_is_named(tmp_path):
    async def test():
        async with saying(tmp_path, QWEN3) as one:
            for wrong, param in WRONG:
                error = (await one.post("", status=400, **wrong)).json()["error"]
                assert (error["param"], error["code"]) == (param, "invalid_argument"), error

    run(test())


def test_a_demanded_call_is_held_to_a_schema_and_told_as_any_other(tmp_path):
    async def test():
        for settings in ({}, {"tool_call_parser": "none"}):
            async with saying(tmp_path, QWEN3, **settings) as one:
                ask = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
                calls = [{"name": "get_weather", "parameters": {"city": "東京"}}]
                choice = await one.choice(json.dumps(calls, ensure_ascii=False), **ask)
                assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
                [call] = choice["message"]["tool_calls"]
                assert call["function"] == {"name": "get_weather", "arguments": '{"city": "東京"}'}
                grammar = one.scheduler.requests[-1].submit.grammar
                assert (grammar.kind, json.loads(grammar.text)) == (
                    "json_schema",
                    schema_of_calls(TOOLS, parallel=False),
                )

                named = {"type": "function", "function": {"name": "now"}}
                choice = await one.choice('{"city": "Paris"}', tools=TOOLS, tool_choice=named)
                assert choice["finish_reason"] == "stop"
                [call] = choice["message"]["tool_calls"]
                assert call["function"] == {"name": "now", "arguments": '{"city": "Paris"}'}
                grammar = one.scheduler.requests[-1].submit.grammar
                assert json.loads(grammar.text) == TOOLS[1]["function"]["parameters"]
                assert "<tools>" in one.prompt()

    run(test())


def test_a_template_without_a_place_for_tools_refuses_them(tmp_path):
    async def test():
        async with saying(tmp_path, R1) as one:
            error = (await one.post("", status=400, tools=[F])).json()["error"]
            assert error["param"] == "tools" and "--chat-template" in error["message"]

    run(test())


OBJECT = {"response_format": {"type": "json_object"}}
MARKS = ("reasoning_open", "reasoning_close", "call_open", "call_close")


def marks(one: Saying) -> list[str]:
    """What the scheduler was told last of that may stand beside a structure."""
    grammar = one.scheduler.requests[-1].submit.grammar
    assert grammar.kind == "json_object"
    return [getattr(grammar, mark) for mark in MARKS]


def test_a_model_that_thinks_does_so_before_a_structure(tmp_path):
    async def test():
        text = '{"name": "now", "arguments": {}}'
        async with saying(tmp_path / "r1", R1) as one:
            message = (await one.choice(f"hm</think>\n\n{text}", **OBJECT))["message"]
            assert (message["content"], message["reasoning"]) == (text, "hm")
            assert marks(one) == ["", "</think>", "", ""]
        async with saying(tmp_path / "qwen3", QWEN3) as one:
            message = (await one.choice(f"<think>hm</think>{text}", **OBJECT))["message"]
            assert (message["content"], message["reasoning"]) == (text, "hm")
            assert marks(one) == ["<think>", "</think>", "", ""]
            message = (await one.choice(text, **OBJECT, chat_template_kwargs={"enable_thinking": False}))["message"]
            assert message["content"] == text and not message.get("reasoning")
            assert marks(one) == ["", "", "", ""]

    run(test())


def test_an_answer_has_a_structure_or_calls_a_tool(tmp_path):
    async def test():
        text = '{"name": "now", "arguments": {}}'
        async with saying(tmp_path / "qwen3", QWEN3) as one:
            message = (await one.choice(text, **OBJECT, tools=TOOLS))["message"]
            assert message["content"] == text and not message.get("tool_calls")
            assert marks(one) == ["<think>", "</think>", "<tool_call>", "</tool_call>"]
            message = (await one.choice(f"<tool_call>\n{text}\n</tool_call>", **OBJECT, tools=TOOLS))["message"]
            [call] = message["tool_calls"]
            assert call["function"] == {"name": "now", "arguments": "{}"} and not message["content"]
            message = (await one.choice(text, **OBJECT, tools=TOOLS, tool_choice="none"))["message"]
            assert message["content"] == text and not message.get("tool_calls")
            assert marks(one) == ["<think>", "</think>", "", ""]
            said = await one.post(text, **OBJECT, tools=TOOLS, tool_choice="required", status=400)
            assert said.json()["error"]["param"] == "response_format"
            assert "calls are demanded" in said.json()["error"]["message"]
        async with saying(tmp_path / "llama3", LLAMA3) as one:
            said = await one.post(text, **OBJECT, tools=TOOLS, status=400)
            assert said.json()["error"]["param"] == "response_format"
            assert "have no marks" in said.json()["error"]["message"]
            message = (await one.choice(text, **OBJECT, tools=TOOLS, tool_choice="none"))["message"]
            assert message["content"] == text

    run(test())
