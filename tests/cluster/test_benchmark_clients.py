"""The benchmark client of vLLM is served: the requests that it sends, its way of reading a stream, and where it is
installed the client itself."""

import json
import os
from typing import Any

import httpx
import pytest

from ops.bench.vllm_client import ENDPOINTS, measure
from tests.builders.cluster import RunningCluster

pytestmark = pytest.mark.cluster

EXACT = {"dtype": "float32"}
PROMPT = "def add(a, b):\n    é = 1\n"
TOKENS = 12
HEADERS = {
    "content-type": "application/json",
    "authorization": "Bearer none",
    "x-request-id": "bench-f06056d2-0",
    "accept": "*/*",
    "accept-encoding": "gzip, deflate",
    "user-agent": "Python/3.11 aiohttp/3.14.5",
}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0}
BODIES: dict[str, dict[str, Any]] = {
    "openai": {
        "model": "bundled",
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "max_tokens": TOKENS,
        "logprobs": None,
        **STREAMED,
    },
    "openai-chat": {
        "model": "bundled",
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "max_completion_tokens": TOKENS,
        **STREAMED,
    },
}
"""As vllm/benchmarks/lib/endpoint_request_func.py of vLLM 0.32 sends them with --ignore-eos and --temperature 0."""


class Messages:
    """The client's reading of a stream: each piece of the network without the white space around it, cut at empty
    lines; what is left counts as whole as soon as it is one JSON text, or the end mark."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, piece: bytes) -> list[str]:
        self._text += piece.strip().decode()
        *whole, self._text = self._text.split("\n\n")
        if self._text.startswith("data: ") and _is_whole(self._text.removeprefix("data: ").strip()):
            whole.append(self._text)
            self._text = ""
        found = [one.strip() for one in whole]
        return [one.removeprefix("data: ") for one in found if one and not one.startswith(":")]


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return text == "[DONE]"
    return True


def read(backend: str, pieces: list[bytes]) -> tuple[str, int, dict[str, Any]]:
    """The text, the number of chunks that the client times, and the usage. Of a chunk with choices it looks at the
    first alone, and takes usage only from one without."""
    messages, text, timed, usage = Messages(), "", 0, {}
    for piece in pieces:
        for message in messages.push(piece):
            chunk = {} if message == "[DONE]" else json.loads(message)
            if choices := chunk.get("choices"):
                timed += 1
                text += (choices[0].get("text") if backend == "openai" else choices[0]["delta"].get("content")) or ""
            elif chunk.get("usage"):
                usage = chunk["usage"]
    return text, timed, usage


@pytest.mark.parametrize("backend", ENDPOINTS)
def test_what_vllms_benchmark_client_sends_is_served_as_it_reads_it(cluster, backend: str) -> None:
    running: RunningCluster = cluster(**EXACT)
    ask = BODIES[backend]
    with httpx.Client(base_url=f"http://{running.http('router')}", timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == ask["model"]
        with client.stream("POST", ENDPOINTS[backend], content=json.dumps(ask), headers=HEADERS) as said:
            assert said.status_code == 200
            assert "x-ignored-fields" not in said.headers
            assert said.headers["x-request-id"] == HEADERS["x-request-id"]
            pieces = list(said.iter_raw())
        whole = {**ask, "stream": False, "stream_options": None}
        [choice] = client.post(ENDPOINTS[backend], json=whole).json()["choices"]
    expected = choice["text"] if backend == "openai" else choice["message"]["content"]
    stream = b"".join(pieces)
    for cut in (pieces, [stream]):
        text, timed, usage = read(backend, cut)
        assert text == expected
        assert 1 < timed <= TOKENS + 2  # a chat's role and the end may have chunks of their own
        assert usage["completion_tokens"] == TOKENS and usage["prompt_tokens"] > 0


@pytest.mark.parametrize("backend", ENDPOINTS)
def test_vllms_benchmark_client_succeeds_with_every_request(cluster, backend: str) -> None:
    python = os.environ.get("TEST_VLLM_PYTHON")
    if not python:
        pytest.skip("TEST_VLLM_PYTHON does not name the Python of an environment with vLLM")
    url = f"http://{cluster(**EXACT).http('router')}"
    told = measure(python, url, backend, prompts=8, concurrency=4, input_len=32, output_len=8)
    assert told["median_ttft_ms"] > 0 and told["request_throughput"] > 0
