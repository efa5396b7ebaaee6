"""From a prompt to token ids and block hashes, on a thread: the part of a request that costs the edge its CPU."""

from collections.abc import Sequence

import msgspec

from services.router.limits import invalid, too_long
from services.router.model import ServedModel
from services.router.parsing.thinking import TAIL_TOKENS, Begins, Thinking
from services.router.request import ChatPrompt, GenerateOptions, Prompt, TextPrompt, TokenPrompt
from shared.prefix import BlockHash, chain, root_hash
from shared.structured import Structured
from shared.text.chat import ChatTemplateError
from shared.text.stops import StopStrings


class Prepared(msgspec.Struct, frozen=True):
    """What placement and the answer need. `chains` holds the block hashes by block size."""

    token_ids: Sequence[int]
    chains: dict[int, list[BlockHash]]
    stops: StopStrings | None
    structured: Structured | None


def prepare(
    model: ServedModel, prompt: Prompt, options: GenerateOptions, max_model_len: int, block_sizes: frozenset[int]
) -> Prepared:
    """Raises RefusedError: invalid_argument or prompt_too_long. Pure but for the time it takes."""
    field, token_ids = _token_ids(model, prompt, max_model_len)
    if not token_ids:
        raise invalid(field, "has no tokens")
    room = max_model_len - len(token_ids)
    if room < 1:
        raise too_long(field, f"{len(token_ids)} tokens", max_model_len)
    if options.stopping.min_tokens > room:
        raise invalid("stopping.min_tokens", f"{options.stopping.min_tokens} tokens do not fit behind this prompt")
    root = root_hash(options.salt, exact=options.deterministic)
    chains = {block_size: chain(token_ids, block_size, root) for block_size in block_sizes}
    structured = _marked(model, options, token_ids)
    return Prepared(token_ids, chains, StopStrings(options.stop) if options.stop else None, structured)


def _marked(model: ServedModel, options: GenerateOptions, token_ids: Sequence[int]) -> Structured | None:
    """The structure, with the marks of what may stand before it, or instead of it."""
    structured, parsing = options.structured, options.parsing
    if structured is None or parsing is None:
        return structured
    marks: dict[str, str] = {}
    if parsing.tool_calls is not None:
        marks["call_open"], marks["call_close"] = parsing.tool_calls.enclosing
    if isinstance(parsing.thinking, Thinking):
        tail = model.tokenizer.decode(token_ids[-TAIL_TOKENS:], skip_special_tokens=False)
        marks |= _marks_of_reasoning(parsing.thinking, parsing.thinking.begins(tail))
    return msgspec.structs.replace(structured, **marks)


def _marks_of_reasoning(thinking: Thinking, begins: Begins) -> dict[str, str]:
    if begins is Begins.BEHIND:
        return {}
    return {"reasoning_open": thinking.open if begins is Begins.PERHAPS else "", "reasoning_close": thinking.close}


def _token_ids(model: ServedModel, prompt: Prompt, max_model_len: int) -> tuple[str, Sequence[int]]:
    """The field that the prompt came in, for refusals, and its tokens."""
    match prompt:
        case TokenPrompt():
            return "token_ids", prompt.token_ids
        case TextPrompt():
            return "prompt", encode(model, "prompt", prompt.text, max_model_len, prompt.add_special_tokens)
        case ChatPrompt():  # a template brings its own special tokens
            return "chat", encode(model, "chat", rendered(model, prompt), max_model_len, False)


def rendered(model: ServedModel, prompt: ChatPrompt) -> str:
    """The conversation as text. Raises RefusedError."""
    assert model.chat_template is not None  # both doors refuse a chat without one
    try:
        return model.chat_template.render(
            prompt.messages,
            tools=prompt.tools,
            template_kwargs=prompt.template_kwargs,
            continue_final_message=prompt.continue_final_message,
        )
    except ChatTemplateError as error:
        raise invalid("chat", str(error)) from None


def encode(model: ServedModel, field: str, text: str, max_model_len: int, add_special_tokens: bool) -> list[int]:
    """The tokens of a text. Text too long for any tokenization is refused before it costs one."""
    if len(text) > max_model_len * model.tokenizer.longest_token_bytes:
        raise too_long(field, f"{len(text)} characters", max_model_len)
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except UnicodeError:
        raise invalid(field, "is not valid Unicode") from None
