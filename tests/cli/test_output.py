"""What the user is told, and what is a bug and stays loud."""

from services.cli.output import user_message
from shared.config import ConfigError
from shared.net.server import BindError


def test_our_own_errors_are_sentences_for_the_user() -> None:
    assert user_message(ConfigError("--port: too high")) == "--port: too high"
    assert user_message(BindError("taken")) == "taken"


def test_an_error_from_inside_a_task_group_is_the_same_sentence() -> None:
    assert user_message(ExceptionGroup("unhandled errors", [BindError("taken")])) == "taken"


def test_the_end_of_memory_says_what_to_do() -> None:
    assert "--kv-cache-memory-bytes" in str(user_message(MemoryError()))
    assert "the pool needs 3 GiB" in str(user_message(MemoryError("the pool needs 3 GiB")))


def test_a_bug_has_no_sentence() -> None:
    assert user_message(KeyError("x")) is None
    assert user_message(ExceptionGroup("two", [BindError("a"), BindError("b")])) is None
