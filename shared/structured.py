"""What an answer must look like, as a value that travels from the router to the worker."""

import msgspec

KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")


class Structured(msgspec.Struct, frozen=True):
    """One constraint on a whole answer. `kind` is one of KINDS and says how `text` is read: a JSON schema, a regular
    expression, a JSON array of strings, a Lark or GBNF grammar; it is empty for "json_object"."""

    kind: str
    text: str = ""
