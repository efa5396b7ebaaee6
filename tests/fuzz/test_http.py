"""Whatever arrives at the HTTP door: an answer or an error in OpenAI's shape, never a failure of ours."""

import asyncio
import json
import random

from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import asking
from tests.builders.router import run, running_router
from tests.builders.tool_text import QWEN3, TOOLS, VOCAB_SIZE, write_tool_model
from tests.counts import count
from tests.fuzz.test_door import IN_FLIGHT, mutated

HELLO = [{"role": "user", "content": "the fox"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": [1]}'}}
CALLED = [*HELLO, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "x"}]
COMMON = {
    "model": "m",
    "max_tokens": 4,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "seed": -7,
    "n": 2,
    "stop": ["zz"],
    "stop_token_ids": [9],
    "logit_bias": {"5": 1.5},
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "repetition_penalty": 1.1,
    "priority": 1,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "return_token_ids": True,
    "include_timing": True,
    "response_format": {"type": "text"},
    "user": "me",
}
SEEDS = {
    "/v1/completions": {**COMMON, "prompt": "the fox", "echo": True, "suffix": None, "best_of": 2},
    "/v1/chat/completions": {
        **COMMON,
        "messages": CALLED,
        "max_completion_tokens": 64,
        "chat_template_kwargs": {"a": [1]},
        "documents": [{"text": "x"}],
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "include_reasoning": False,
    },
    "/tokenize": {"prompt": "the fox", "messages": HELLO, "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6, 7]},
}
DEEP: list = []
for _ in range(60):
    DEEP = [DEEP]
JUNK = [
    *(None, True, False, 0, -1, 1, 2**31, -(2**31), 2**63, 2**64, 10**40, 0.5, -0.5, 1e308, -1e308, 5e-324),
    *("", "x", "none", "auto", "\x00", "\ud7ff", "é" * 300, "m", "text"),
    *([], [[]], [None], [0], [-1], [399], [400], ["x"], [[5, 6], "x"], [{"role": "user"}], [{"role": "tool"}], DEEP),
    *([{"type": "function", "function": {"name": "f", "parameters": DEEP}}], [{"type": "function"}], TOOLS * 200),
    *(
        [{"role": "assistant", "tool_calls": [junk]}]
        for junk in (None, {}, {"function": {}}, {"function": {"name": "f"}})
    ),
    *({"type": "function", "function": {"name": name}} for name in ("now", "x", 5)),
    *({}, {"type": "text"}, {"type": "json_object"}, {"5": "x"}, {"-1": 1}, {"99999999999999999999": 1}, {"a": DEEP}),
]
SERVED = {200, 400, 404, 413}


def body(rng: random.Random, path: str) -> bytes:
    """A request with some of its fields missing or made of something else; now and then no JSON any more."""
    ask = {name: value for name, value in SEEDS[path].items() if rng.random() < 0.4}
    for _ in range(rng.randrange(3)):
        name = rng.choice([*SEEDS[path], "logprobs", "top_logprobs", "prompt_logprobs", "request_id"])
        ask[name] = rng.choice(JUNK)
    data = json.dumps(ask).encode()
    return mutated(rng, data) if rng.random() < 0.3 else data


def test_no_body_is_a_failure_of_ours(tmp_path):
    async def test():
        rng = random.Random(6)
        model = write_tool_model(tmp_path / "m", QWEN3)
        scheduler = FakeScheduler(vocab_size=VOCAB_SIZE, max_model_len=2048)
        seen: dict[int, int] = {}
        async with running_router(model, scheduler) as router, asking(router) as client:

            async def some(number: int) -> None:
                for _ in range(number):
                    path = rng.choice(list(SEEDS))
                    sent = body(rng, path)
                    said = await client.post(path, content=sent, headers={"content-type": "application/json"})
                    assert said.status_code in SERVED, (path, sent, said.text)
                    seen[said.status_code] = seen.get(said.status_code, 0) + 1
                    if said.status_code != 200:
                        assert set(said.json()["error"]) == {"message", "type", "param", "code"}, (path, sent)
                    elif said.headers["content-type"].startswith("text/event-stream"):
                        assert said.text.endswith("data: [DONE]\n\n"), (path, sent, said.text[-300:])
                    else:
                        said.json()

            await asyncio.gather(*(some(count("fuzz_bodies") // IN_FLIGHT) for _ in range(IN_FLIGHT)))
            await router.idle()
        assert seen[200] > sum(seen.values()) / 10 and seen[400] > sum(seen.values()) / 10, seen

    run(test(), timeout_s=600)
