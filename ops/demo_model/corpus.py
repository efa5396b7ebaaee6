"""The text: this interpreter's standard library as documents, and its functions as questions and answers."""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_FOLDERS = {"site-packages", "__pycache__", "encodings", "lib2to3", "config", "msilib"}
LARGEST_FILE = 800_000  # bytes
SYSTEM = "You answer with Python code."


@dataclass(frozen=True)
class Source:
    """One file: its path below the library's root, its text, whether it is a test, and whether it is held out."""

    path: str
    text: str
    is_test: bool
    held_out: bool


@dataclass(frozen=True)
class Function:
    """A function as it stands in the library, unindented and without decorators."""

    signature: str
    docstring: str | None
    code: str
    is_method: bool


@dataclass(frozen=True)
class Chat:
    """A question, its answer, and the system message before them, if any."""

    user: str
    assistant: str
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation as a chat template takes it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.assistant}]
        return system + turns


def held_out(path: str, seed: int, share: float) -> bool:
    """Decide by a seeded hash of its path whether a file is kept from training."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def sources(seed: int, share: float) -> list[Source]:
    """Read the standard library's Python files, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        parts = set(name.split("/")[:-1])
        if parts & EXCLUDED_FOLDERS or path.stat().st_size > LARGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        is_test = bool(parts & {"test", "tests", "idle_test"})
        found.append(Source(name, text, is_test, held_out(name, seed, share)))
    return [source for source in found if len(source.text) > 40]


def pieces(text: str, limit: int) -> list[str]:
    """Cut a file before top-level statements into pieces of at most `limit` characters where they allow it."""
    if len(text) <= limit:
        return [text]
    lines = text.splitlines(keepends=True)
    starts = [_first_line(node) for node in ast.parse(text).body][1:]
    blocks = ["".join(lines[a:b]) for a, b in zip([0, *starts], [*starts, len(lines)], strict=True)]
    cut = [""]
    for block in blocks:
        if cut[-1] and len(cut[-1]) + len(block) > limit:
            cut.append("")
        cut[-1] += block
    return [piece.strip("\n") + "\n" for piece in cut if piece.strip()]


def _first_line(node: ast.stmt) -> int:
    """Return the index of a statement's first line, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def functions(source: Source) -> Iterator[Function]:
    """Yield the file's functions and methods, outermost first."""
    for parent in ast.walk(ast.parse(source.text)):
        if not isinstance(parent, ast.Module | ast.ClassDef):
            continue
        for node in parent.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield _function(source.text, node, isinstance(parent, ast.ClassDef))


def _function(text: str, node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> Function:
    """Take a function out of its file."""
    lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
    signature = f"{node.name}({ast.unparse(node.args)})"
    return Function(signature, ast.get_docstring(node), textwrap.dedent("".join(lines)).rstrip(), is_method)


def chats(function: Function, draw: random.Random, passes: int) -> list[Chat]:
    """Ask for a function in up to `passes` different ways; one without a docstring is asked for once at most."""
    if not function.docstring or function.docstring.startswith((">>>", "#")):
        if function.is_method or draw.random() < 0.5:
            return []
        return [Chat(f"Write a function {function.signature}.", function.code)]
    asked = draw.sample(_questions(function), k=passes)
    return [Chat(question, function.code, SYSTEM if draw.random() < 0.1 else None) for question in asked]


def _questions(function: Function) -> list[str]:
    """Phrase the request for a documented function in several ways."""
    docstring = function.docstring or ""
    summary = " ".join(docstring.split("\n\n")[0].split())
    sentence = summary.split(". ")[0].rstrip(".") + "."
    lowered = sentence[0].lower() + sentence[1:]
    noun = "method" if function.is_method else "function"
    return [
        sentence,
        summary,
        docstring,
        f"Write a {noun} {function.signature} that does this: {lowered}",
        f"Write a {noun} that does this: {lowered}",
        f'def {function.signature}:\n    """{sentence}"""',
    ]
