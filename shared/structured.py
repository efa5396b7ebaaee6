"""What an answer must look like, as a value that travels from the router to the worker."""

from typing import Any

import msgspec

KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")


class Structured(msgspec.Struct, frozen=True):
    """One constraint on an answer: on all of it, or on what follows its reasoning and is no call. `kind` is one of
    KINDS and says how `text` is read: a JSON schema, a regular expression, a JSON array of strings, a Lark or GBNF
    grammar; it is empty for "json_object"."""

    kind: str
    text: str = ""
    reasoning_close: str = ""
    """The mark behind reasoning, before which any text may stand; empty: the answer has none."""
    reasoning_open: str = ""
    """The mark that reasoning begins with, where there is any; empty: the prompt has opened it, and it is closed."""
    call_open: str = ""
    """The marks around calls of tools, which the answer may be instead; empty: it may not."""
    call_close: str = ""

    @classmethod
    def of(cls, grammar: Any) -> "Structured":
        """From a message Grammar (scheduling.proto), which has the same fields."""
        return cls(*(getattr(grammar, name) for name in cls.__struct_fields__))
