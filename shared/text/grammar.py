"""llguidance, behind one door: constraints as grammars, with limits on the time and the memory that one may take.

JSON is written compactly, or with one space behind a comma or a colon: a grammar that allows whitespace everywhere
lets a model write nothing else.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from shared.structured import Structured

MAX_MESSAGE_CHARS = 400
MAX_PLACES = 200
MAX_PLACE_S = 1.0
"""Parts of a schema that are compiled by themselves, to say which of them is wrong, and the time after which no further
one is."""
JSON_OPTIONS: Any = {"lenient": False, "whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
LARK_BEGINS = ("start:", "start :", "?start:", "%llguidance")
MAX_GBNF_CHARS = 8 * 1024
"""llguidance converts GBNF in Python, in a time that grows with the square of it: half a second for so much."""
CHECKS_KEPT = 64
"""Verdicts: clients send the same schema again and again."""
MAX_LARK_CHARS = 32 * 1024
MAX_TERMINALS = 256
"""Of Lark. llguidance gives each the fuel anew that ended the one before, and its time grows with the square of how
many there are: 2,000 of them in 32 KiB took 90 s."""
TERMINAL = re.compile(r"\s*[_?!]*[A-Z][^:\"/]*:")
"""The line that begins one."""
STACK_BYTES = 256 * 2**20
"""Of a thread that compiles; only what is used of it takes memory. llguidance follows references by recursion, at some
10 KB a level, and ends the process where the stack does: the longest chains that fit into a request take some 70 MB."""
ANY_OBJECT = '{"type":"object"}'
SUBSCHEMAS = ("items", "additionalProperties", "additionalItems")
LISTS_OF_SUBSCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
MAPS_OF_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


NO_TOKEN = frozenset({"NoExtension", "NoExtensionBias"})
"""llguidance's bare reasons for a place where no token is allowed."""
UNSATISFIABLE = "nothing can satisfy it: no token of this model may come next"
TOO_COMPLEX = "lexer error: "
UNSATISFIABLE_SCHEMA = "Unsatisfiable schema: "
EXHAUSTED = "fuel exhausted"


T = TypeVar("T")
_starting = threading.Lock()
"""The size of new threads' stacks is the whole process's."""


class GrammarError(ValueError):
    """A constraint that cannot be compiled, or that is too large; the message says where it is wrong."""


def limits() -> LLParserLimits:
    """Of one grammar. The worst that was found takes 2 s to check and as long to compile on a busy machine; the fuel of
    a step is about 10 ms."""
    return LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=150_000,
        max_lexer_states=50_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


def check(structured: Structured) -> None:
    """Compiles it for a vocabulary of single bytes, as far as the first choice. Blocking, without the interpreter's
    lock; at once for one of the last. Raises GrammarError."""
    fault = _fault_of(Structured(structured.kind, structured.text))
    if fault:
        raise GrammarError(fault)


@functools.lru_cache(CHECKS_KEPT)
def _fault_of(structured: Structured) -> str:
    """What is wrong with it, and where; empty where nothing is known to be."""
    try:
        _on_deep_stack(lambda: _check(structured))
    except GrammarError as error:
        return str(error)
    return ""


def _check(structured: Structured) -> None:
    fault = _fault_in(_grammar_of(structured))
    if fault and structured.kind == "json_schema":
        raise _error(*_placed(json.loads(structured.text), fault))
    if fault:
        raise _error(fault)


def load_vocabulary(tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> LLTokenizer:
    """The tokens of a model with `vocab_size` logits, padding included. Takes about a second for 128,000 of them."""
    return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))


def compile_grammar(structured: Structured, vocabulary: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an answer, its first mask computed once: copies of it find that ready. Blocking,
    without the interpreter's lock. Raises GrammarError."""
    return _on_deep_stack(lambda: _compile(structured, vocabulary))


def _compile(structured: Structured, vocabulary: LLTokenizer) -> LLMatcher:
    grammar = _grammar_of(structured)
    if structured.reasoning_close or structured.call_open:
        grammar = _among_others(grammar, structured, vocabulary)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _error(fault_of(matcher))
    return matcher


def _on_deep_stack(work: Callable[[], T]) -> T:
    """What the work returns or raises, done on a thread of its own with a stack of STACK_BYTES."""
    done: Future[T] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=do, name="grammar").start()
        finally:
            threading.stack_size(before)
    return done.result()


def _among_others(grammar: str, structured: Structured, vocabulary: LLTokenizer) -> str:
    """The grammar for an answer that may begin with reasoning and may be calls instead. Up to two line feeds part
    these, and what stands between marks is free."""
    [answer] = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    start, rules = "said", ["said: @answer", "gap: /\\n{0,2}/"]
    if structured.call_open:
        rules[0] += " | call (gap call)* gap"
        rules.append(f"call: {_mark(structured.call_open, vocabulary)[0]} called")
        rules.append(_until("called", structured.call_close, vocabulary))
    if structured.reasoning_close:
        rules.append(_until("reasoning", structured.reasoning_close, vocabulary))
        start = "reasoning gap said"
    if structured.reasoning_open:
        start = f"{_mark(structured.reasoning_open, vocabulary)[0]} reasoning gap said | said"
    lark = "\n".join([f"start: {start}", *rules])
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**answer, "name": "answer"}]})


def _until(rule: str, mark: str, vocabulary: LLTokenizer) -> str:
    """A rule for any text up to the mark, and that."""
    spelled, is_token = _mark(mark, vocabulary)
    return f"{rule}: /(?s:.*)/ {spelled}" if is_token else f"{rule}[suffix={spelled}]: /(?s:.*)/"


def _mark(text: str, vocabulary: LLTokenizer) -> tuple[str, bool]:
    """As Lark spells it, and whether it is a special token, which no text is."""
    token_ids = vocabulary.tokenize_str(text, parse_special=True)
    if len(token_ids) == 1 and vocabulary.is_special_token(token_ids[0]):
        return f"<[{token_ids[0]}]>", True
    return json.dumps(text), False


def fault_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, in words for the client, on one line; empty where it can."""
    bare = _one_line(matcher.get_error())
    if bare.startswith(TOO_COMPLEX):
        return f"too complex: {bare.removeprefix(TOO_COMPLEX)}"
    return UNSATISFIABLE if bare in NO_TOKEN else bare


def _grammar_of(structured: Structured) -> str:
    """As llguidance spells it."""
    try:
        match structured.kind:
            case "json_object":
                return LLMatcher.grammar_from_json_schema(ANY_OBJECT, overrides=JSON_OPTIONS)
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(structured.text, overrides=JSON_OPTIONS)
            case "regex":
                return LLMatcher.grammar_from_regex(structured.text)
            case "choice":
                return LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(structured.text))))
            case "grammar":
                return LLMatcher.grammar_from_lark(_lark_of(structured.text))
    except GrammarError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(str(error)) from None
    raise GrammarError(f"structure of an unknown kind, {structured.kind!r}")


def _lark_of(text: str) -> str:
    """The text itself where it is Lark, which has a rule `start`; else GBNF, converted."""
    if any(line.lstrip().startswith(LARK_BEGINS) for line in text.splitlines()):
        _check_lark(text)
        return text
    if len(text) > MAX_GBNF_CHARS:
        raise GrammarError(f"{len(text)} characters of GBNF; {MAX_GBNF_CHARS} are allowed, and more of Lark")
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # llguidance raises bare Exception
        raise _error(f"neither Lark (no rule `start:`) nor GBNF: {error}") from None


def _check_lark(text: str) -> None:
    if len(text) > MAX_LARK_CHARS:
        raise GrammarError(f"{len(text)} characters of Lark; {MAX_LARK_CHARS} are allowed")
    num_terminals = sum(TERMINAL.match(line) is not None for line in text.splitlines())
    if num_terminals > MAX_TERMINALS:
        raise GrammarError(f"{num_terminals} terminals (names in capitals); {MAX_TERMINALS} are allowed")


def _fault_in(grammar: str) -> str:
    """Why it compiles for no model, or why no text can begin an answer or go on behind the text that begins them all.
    Empty where nothing is known to be wrong."""
    matcher = LLMatcher(_bytes_vocabulary(), grammar, log_level=0, limits=limits())
    if matcher.is_error() and fault_of(matcher) != UNSATISFIABLE and EXHAUSTED not in matcher.get_error():
        return _one_line(LLMatcher.validate_grammar(grammar, None, limits=limits()))  # which knows all special tokens
    allows = any(matcher.compute_bitmask())
    if allows and matcher.consume_tokens(matcher.compute_ff_tokens()):
        allows = any(matcher.compute_bitmask())
    return fault_of(matcher) or ("" if allows else UNSATISFIABLE)


class _Bytes:
    """Tokens as llguidance asks for them: one of each byte, and the end."""

    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@functools.cache
def _bytes_vocabulary() -> LLTokenizer:
    """Takes some milliseconds."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def _error(message: str, place: str = "") -> GrammarError:
    told = _one_line(message)
    cut = told if len(told) <= MAX_MESSAGE_CHARS else told[:MAX_MESSAGE_CHARS] + "…"
    return GrammarError(f"at {place}: {cut}" if place else cut)


def _one_line(message: str) -> str:
    return " ".join(message.removesuffix("<non-verbose/>").split())


def _placed(schema: Any, fault: str) -> tuple[str, str]:
    """What is wrong with the innermost part that by itself has the same fault, or is unsatisfiable as the whole is, and
    a JSON pointer to it; empty for the whole."""
    place, tried, end = "", 0, time.monotonic() + MAX_PLACE_S
    parts = list(_parts(schema))
    while parts and tried < MAX_PLACES and time.monotonic() < end:
        step, part = parts.pop(0)
        tried += 1
        found = _fault_in(_grammar_of(Structured("json_schema", json.dumps(part)))) if isinstance(part, dict) else ""
        if found == fault or _both_unsatisfiable(found, fault):
            place, parts, fault = place + step, list(_parts(part)), found
    return fault, place


def _both_unsatisfiable(*faults: str) -> bool:
    return all(fault.startswith(UNSATISFIABLE_SCHEMA) for fault in faults)


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one, each with the step of a JSON pointer that leads there."""
    if not isinstance(schema, dict):
        return
    for key in SUBSCHEMAS:
        if isinstance(schema.get(key), dict):
            yield f"/{key}", schema[key]
    for key in LISTS_OF_SUBSCHEMAS:
        if isinstance(schema.get(key), list):
            yield from ((f"/{key}/{number}", part) for number, part in enumerate(schema[key]))
    for key in MAPS_OF_SUBSCHEMAS:
        if isinstance(schema.get(key), dict):
            yield from ((f"/{key}/{_escaped(name)}", part) for name, part in schema[key].items())


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
