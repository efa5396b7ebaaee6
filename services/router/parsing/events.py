"""What a parser makes of an answer's text, in order."""

import msgspec


class Reasoning(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers."""

    text: str


class Content(msgspec.Struct, frozen=True):
    """More of the answer itself."""

    text: str


class CallBegun(msgspec.Struct, frozen=True):
    """The index-th call of a tool; its arguments follow."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments, a JSON text as the model wrote it."""

    index: int
    text: str


Part = Reasoning | Content | CallBegun | CallArguments
