"""Makes a picture of a terminal: ANSI text on standard input, SVG on standard output. How demo.svg was made:

tmux new-session -d -s picture -x 110 -y 60 'sh ops/scripts/demo; sleep 60'
sleep 20; tmux capture-pane -t picture -ep | .venv/bin/python ops/pictures/capture.py > ops/pictures/demo.svg

Its arguments are the command to show above, and the width: trace.svg is `sluice trace` in a window of 140 columns.
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

COMMAND = "sh ops/scripts/demo"


def picture(ansi: str, command: str = COMMAND, *, width: int = 110) -> str:
    """The SVG of `ansi`, without the empty lines at its end."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold green]$[/] {command}")
    console.print(Text.from_ansi(ansi.rstrip()))
    svg = console.export_svg(title="sluice")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no fonts from elsewhere: any monospace will do


if __name__ == "__main__":
    command, width = (sys.argv[1:] + [COMMAND, "110"][len(sys.argv) - 1 :])[:2]
    print(picture(sys.stdin.read(), command, width=int(width)))
