"""Defaults, then the TOML file, then the environment, then flags: the last one that speaks wins."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

Config = TypeVar("Config", bound=msgspec.Struct)

ENV_PREFIX = "SLUICE_"
RESERVED = frozenset({"SLUICE_ADDRESS", "SLUICE_CONFIG", "SLUICE_TEST_TIER", "SLUICE_TLS", "SLUICE_TORCH_INDEX"})
"""Variables that are no field of a service: of the command line, of the scripts and of the tests."""


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what is allowed."""


def load_config(
    kind: type[Config],
    *,
    section: str,
    file: str = "",
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
) -> Config:
    """Builds one service's configuration.

    `file` is a TOML file whose top level and `[section]` table are read; flags whose value is None are unset.
    Raises ConfigError naming the key, where it came from and what it may be.
    """
    _require_known(environ)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    if file:
        values.update(_from_file(Path(file), section, set(fields)))
    for name, field in fields.items():
        text = environ.get(ENV_PREFIX + name.upper())
        if text is not None:
            values[name] = _from_text(text, field.type, ENV_PREFIX + name.upper())
    values.update({name: value for name, value in flags.items() if value is not None and name in fields})
    try:
        return msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{section}: {_readable(error)}") from None


def _require_known(environ: Mapping[str, str]) -> None:
    """A variable that no service reads is a slip of the pen, and would be ignored in silence."""
    known = RESERVED | {ENV_PREFIX + name.upper() for name in _all_fields()}
    unknown = sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)
    if unknown:
        names = [name.removeprefix(ENV_PREFIX) for name in sorted(known)]
        near = difflib.get_close_matches(unknown[0].removeprefix(ENV_PREFIX), names, n=1)
        meant = f"; did you mean {ENV_PREFIX}{near[0]}?" if near else ""
        raise ConfigError(f"unknown variable {', '.join(unknown)}{meant}")


SECTIONS = ("router", "scheduler", "worker", "up")


def _from_file(path: Path, section: str, known: set[str]) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    # `scheduler` is a field of two services and a section too: a table is always a section.
    sections = {key: value for key, value in data.items() if key in SECTIONS and isinstance(value, dict)}
    top = {key: value for key, value in data.items() if key not in sections}
    own = sections.get(section, {})
    unknown = [f"[{section}] {key}" for key in own if key not in known]
    unknown += [key for key in top if key not in _all_fields()]
    if unknown:
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}")
    shared = {key: value for key, value in top.items() if key in known}
    return {**shared, **own}


def _all_fields() -> set[str]:
    from shared.config import services

    kinds = (services.RouterConfig, services.SchedulerConfig, services.WorkerConfig, services.UpConfig)
    return {name for kind in kinds for name in kind.__struct_fields__}


def _from_text(text: str, kind: Any, source: str) -> Any:
    try:
        if kind == tuple[str, ...]:
            return tuple(part for part in text.split(",") if part)
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}={text!r}: {_readable(error)}") from None


def _readable(error: msgspec.ValidationError) -> str:
    """msgspec's message with the flag spelled as a user types it."""
    message, _, path = str(error).partition(" - at ")
    name = path.strip("`").removeprefix("$.").replace("_", "-")
    return f"--{name}: {message}" if name else message
