"""The model families whose answers can be taken apart, by the names that vLLM gives their parsers."""

import secrets
from collections.abc import Callable

import msgspec

from services.router.parsing import hermes, llama3, mistral, pythonic
from services.router.parsing.forced import one_call, some_calls
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker, Tools
from services.router.parsing.thinking import Thinking


def _call_id() -> str:
    """As OpenAI's: `call_` and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return secrets.token_hex(5)[:9]


class ToolCalls(msgspec.Struct, frozen=True, kw_only=True):
    """How one family calls tools."""

    read: Callable[[Reader, Speaker, Tools], Waiting[None]]
    """Reads the rest of an answer."""
    marks: tuple[str, ...]
    new_id: Callable[[], str] = _call_id


TOOL_CALLS: dict[str, ToolCalls] = {
    "hermes": ToolCalls(read=hermes.hermes, marks=hermes.MARKS),
    "llama3_json": ToolCalls(read=llama3.llama3_json, marks=llama3.MARKS),
    "mistral": ToolCalls(read=mistral.mistral, marks=mistral.MARKS, new_id=_short_id),
    "pythonic": ToolCalls(read=pythonic.pythonic, marks=pythonic.MARKS),
}
THINKING: dict[str, Thinking] = {
    "deepseek_r1": Thinking(always=True),
    "qwen3": Thinking(),
    "mistral": Thinking(open="[THINK]", close="[/THINK]"),
}


def forced(family: ToolCalls | None, *, named: bool) -> ToolCalls:
    """How calls are read that a request demands of a model of this family: of the one tool that is named, or of any."""
    new_id = family.new_id if family is not None else _call_id
    return ToolCalls(read=one_call if named else some_calls, marks=(), new_id=new_id)


def tool_calls_of(template: str) -> str:
    """The family that a chat template asks to call tools its way; empty where that is none of ours."""
    if "<tool_call>" in template:
        foreign = ("<function=", "<arg_key>")  # Qwen3-Coder, GLM 4.5: other text between the same marks
        return "" if any(mark in template for mark in foreign) else "hermes"
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
    if "</think>" not in template and "<think>" not in template:
        return ""
    return "deepseek_r1" if "<\uff5cAssistant\uff5c>" in template and "<think>" in template else "qwen3"
