"""The JSON that clients send, as the `openai` client and vLLM's users spell it.

Unknown fields are ignored; the answer's header x-ignored-fields names them. `null` is the same as unset, everywhere.
Fields that would change the answer and are not served are declared too, in UNSERVED: they are refused by name.
"""

import functools
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

TokenId = Annotated[int, Meta(ge=0, lt=2**32)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`include_usage`: a last chunk with the usage; `continuous_usage_stats`: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer is held to the schema, `strict` or not."""

    name: str | None = None
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's: `type` is text, json_object or json_schema."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's: one of these."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    structural_tag: Any = UNSET
    whitespace_pattern: Any = UNSET
    disable_additional_properties: Any = UNSET


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion share. Sampling and stopping are named and meant as in resolve.Asked."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """-1 is off, as is 0."""
    min_p: float | None = None
    seed: int | None = None
    """In 64 bits, with or without a sign."""
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    """As in StructuredOutputs, the others too: vLLM's former names."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    deterministic: bool | None = None
    """Ours: bit-identical answers whatever the batch."""
    include_timing: bool | None = None
    """Ours: `timing` in the answer, or in its last chunk."""

    use_beam_search: Any = UNSET
    allowed_token_ids: Any = UNSET
    bad_words: Any = UNSET
    logprob_token_ids: Any = UNSET
    truncate_prompt_tokens: Any = UNSET
    thinking_token_budget: Any = UNSET
    repetition_detection: Any = UNSET


class CompletionRequest(Common, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any] | None = None
    """A text, token ids, or a list of either."""
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None

    suffix: Any = UNSET
    prompt_embeds: Any = UNSET


class ChatRequest(Common, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    """For the template; without meaning to the models that do not know it."""
    include_reasoning: bool | None = None
    """Whether the answer tells the model's reasoning, where it is told apart: true."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    functions: Any = UNSET
    function_call: Any = UNSET
    chat_template: Any = UNSET
    echo: Any = UNSET
    add_special_tokens: Any = UNSET


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: of a prompt, or of messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template: Any = UNSET


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


UNSERVED: dict[str, str] = {
    "structural_tag": "is not served; use json, regex, choice or grammar",
    "whitespace_pattern": "is not served; JSON is written with at most one space, behind a comma or a colon",
    "disable_additional_properties": 'is not served; say "additionalProperties": false in the schema',
    "functions": "was replaced by tools",
    "function_call": "was replaced by tool_choice",
    "use_beam_search": "beam search is not served",
    "allowed_token_ids": "is not served; use logit_bias",
    "bad_words": "is not served; use logit_bias",
    "logprob_token_ids": "is not served; use logprobs",
    "truncate_prompt_tokens": "prompts are not truncated; send a shorter one",
    "thinking_token_budget": "is not served; use max_tokens",
    "repetition_detection": "is not served; use frequency_penalty",
    "suffix": "text is completed at its end alone",
    "prompt_embeds": "prompts are text or token ids",
    "chat_template": "a template is the operator's to give: --chat-template",
    "echo": "is not served for chats",
    "add_special_tokens": "a chat's special tokens are its template's",
}
"""Fields that are refused unless they ask for nothing (null, false, empty), and why."""


def unserved(request: msgspec.Struct) -> str:
    """The first field of a request that asks for what is not served; empty where there is none."""
    for name in UNSERVED:
        if name in _unserved_of(type(request)) and _asks(getattr(request, name)):
            return name
    return ""


def _asks(value: Any) -> bool:
    """0 does, though it equals false."""
    if isinstance(value, UnsetType) or value is None or value is False:
        return False
    return value not in ("", [], {}, "none")


@functools.cache
def _unserved_of(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The fields that are declared to be refused."""
    return frozenset(field.name for field in msgspec.structs.fields(kind) if field.default is UNSET)
