"""The services' log lines as a person at a terminal wants them: few and short. Files and pipes get them whole."""

from typing import Any

import msgspec
from rich.text import Text

HIDDEN = frozenset({"service", "instance", "timestamp", "level", "event", "exception"})
"""Fields that every line has, or that are shown otherwise."""
SHOWN_EVENTS = frozenset({"request"})
"""Of the lines that only inform: one per request. What starts and ends, the supervisor says itself."""
STYLES = {"warning": "yellow", "error": "red", "critical": "red"}


def compact(text: str, *, stopping: bool) -> Text | None:
    """One line of a service's log, shortened; None when it is not worth a person's time.

    A line that is not JSON (a crash, a print) is shown as it is. While the cluster stops, services miss each other:
    only errors are shown then.
    """
    try:
        line: dict[str, Any] = msgspec.json.decode(text, type=dict)
    except msgspec.MsgspecError:
        return Text(text)
    level, event = str(line.get("level", "info")), str(line.get("event", ""))
    if level not in STYLES and event not in SHOWN_EVENTS:
        return None
    if stopping and level == "warning":
        return None
    facts = "  ".join(f"{name}={_short(value)}" for name, value in line.items() if name not in HIDDEN)
    shown = Text.assemble((event, STYLES.get(level, "bold")), "  ", (facts, "dim" if level == "info" else ""))
    for raised in line.get("exception", ())[:1]:
        frame = (raised.get("frames") or [{}])[-1]
        where = f"{frame.get('filename')}:{frame.get('lineno')}"
        shown.append(f"\n{raised.get('exc_type')}: {raised.get('exc_value')}  at {where}", "red")
    return shown


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
