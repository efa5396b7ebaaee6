"""Llama 3.1 and 3.2: an answer that is `{"name": …, "parameters": {…}}`, several of them parted by `;`, perhaps behind
`<|python_tag|>`."""

from collections.abc import Collection

from services.router.parsing.calls import call_object
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

TAG = "<|python_tag|>"
MARKS = (TAG,)


def llama3_json(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """An answer may be JSON and no call: without the tag it must begin with one, of a tool that was named."""
    mark = ""
    while True:
        read.record(mark)
        yield from _calls(read, say, () if mark else names)
        say.content(read.recorded())
        mark = yield from read.until(MARKS, say.content)
        if not mark:
            return


def _calls(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """One after the other, as far as there are any."""
    while True:
        yield from read.space()
        if not (yield from call_object(read, say, names)):
            return
        read.record()
        yield from read.space()
        yield from read.literal(";", ",")
