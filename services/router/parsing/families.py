"""The model families whose answers can be taken apart, by the names that vLLM gives their parsers."""

import secrets
from collections.abc import Callable

import msgspec

from services.router.parsing import deepseek, glm45, harmony, hermes, kimi_k2, llama3, mistral, pythonic, qwen3_coder
from services.router.parsing.forced import one_call, some_calls
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import NewId, Speaker, Tools
from services.router.parsing.thinking import Thinking, Thinks


def call_id(name: str, index: int) -> str:
    """As OpenAI's: `call_` and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def _short_id(name: str, index: int) -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return secrets.token_hex(5)[:9]


class ToolCalls(msgspec.Struct, frozen=True, kw_only=True):
    """How one family calls tools."""

    read: Callable[[Reader, Speaker, Tools], Waiting[None]]
    """Reads the rest of an answer."""
    marks: tuple[str, ...]
    enclosing: tuple[str, str] = ("", "")
    """The marks around each call, of a family whose calls all stand between two."""
    new_id: NewId = call_id


TOOL_CALLS: dict[str, ToolCalls] = {
    "deepseek_v3": ToolCalls(read=deepseek.deepseek, marks=deepseek.MARKS),
    "deepseek_v31": ToolCalls(read=deepseek.deepseek, marks=deepseek.MARKS),
    "glm45": ToolCalls(read=glm45.glm45, marks=glm45.MARKS, enclosing=(glm45.OPEN, glm45.CLOSE)),
    "hermes": ToolCalls(read=hermes.hermes, marks=hermes.MARKS, enclosing=hermes.MARKS),
    "kimi_k2": ToolCalls(read=kimi_k2.kimi_k2, marks=kimi_k2.MARKS, new_id=kimi_k2.new_id),
    "llama3_json": ToolCalls(read=llama3.llama3_json, marks=llama3.MARKS),
    "llama4_pythonic": ToolCalls(read=pythonic.pythonic, marks=pythonic.MARKS),
    "mistral": ToolCalls(read=mistral.mistral, marks=mistral.MARKS, new_id=_short_id),
    "openai": ToolCalls(read=harmony.harmony, marks=harmony.MARKS),
    "pythonic": ToolCalls(read=pythonic.pythonic, marks=pythonic.MARKS),
    "qwen3_coder": ToolCalls(
        read=qwen3_coder.qwen3_coder,
        marks=qwen3_coder.MARKS,
        enclosing=(qwen3_coder.OPEN, qwen3_coder.CLOSE),
    ),
}
THINKING: dict[str, Thinks] = {
    "deepseek_r1": Thinking(always=True),
    "qwen3": Thinking(),
    "openai_gptoss": harmony.Harmony(),
    "mistral": Thinking(open="[THINK]", close="[/THINK]"),
}


def forced(family: ToolCalls | None, *, named: bool) -> ToolCalls:
    """How calls are read that a request demands of a model of this family: of the one tool that is named, or of any."""
    new_id = family.new_id if family is not None else call_id
    return ToolCalls(read=one_call if named else some_calls, marks=(), new_id=new_id)


def tool_calls_of(template: str) -> str:
    """The family that a chat template asks to call tools its way; empty where that is none of ours."""
    if "<tool_call>" in template:  # what is between these marks differs
        return "qwen3_coder" if "<function=" in template else "glm45" if "<arg_key>" in template else "hermes"
    if deepseek.SECTION.call in template:
        return "deepseek_v3" if deepseek.FENCE in template else "deepseek_v31"
    if kimi_k2.SECTION.open in template:
        return "kimi_k2"
    if harmony.CHANNEL in template:
        return "openai"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "[func_name1(param" in template:
        return "pythonic"
    if "<|python_tag|>" in template or '"parameters": dictionary of argument name' in template:
        return "llama3_json"
    return ""


def thinking_of(template: str) -> str:
    """The family whose marks of reasoning a chat template knows; empty where it knows none of ours."""
    if "[THINK]" in template:
        return "mistral"
    if harmony.CHANNEL in template:
        return "openai_gptoss"
    if "</think>" not in template and "<think>" not in template:
        return ""
    return "deepseek_r1" if "<\uff5cAssistant\uff5c>" in template and "<think>" in template else "qwen3"
