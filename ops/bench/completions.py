"""A completion streamed over HTTP by a bare socket: a client that takes as little of the machine as it can, of any
server that speaks OpenAI's API."""

import asyncio
import json
import time
from typing import Any

import msgspec

HEAD = "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
DONE = b"data: [DONE]\n\n"


class Streamed(msgspec.Struct, frozen=True):
    """When the first and the last piece of an answer came (time.perf_counter), and its tokens by the server's count."""

    first_s: float
    last_s: float
    tokens: int


async def stream_completion(address: str, ask: dict[str, Any]) -> Streamed:
    """Raises RuntimeError where the answer is no stream with its usage at the end."""
    body = json.dumps({**ask, "stream": True, "stream_options": {"include_usage": True}})
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write((HEAD.format(address, len(body)) + body).encode())
        said, first_s = b"", 0.0
        while DONE not in said:
            piece = await reader.read(65_536)
            if not piece:
                raise RuntimeError(f"the stream broke off: {said[-300:].decode(errors='replace')}")
            said += piece
            if not first_s and b'"text":' in said:
                first_s = time.perf_counter()
        last_s = time.perf_counter()
    finally:
        writer.close()
    usage = said[said.rindex(b'"completion_tokens":') :]
    return Streamed(first_s, last_s, int(usage.partition(b":")[2].partition(b",")[0].rstrip(b"}")))
