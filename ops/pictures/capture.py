"""Makes a picture of a terminal: ANSI text on standard input, SVG on standard output. How demo.svg was made:

tmux new-session -d -s picture -x 110 -y 60 'sh ops/scripts/demo; sleep 60'
sleep 20; tmux capture-pane -t picture -ep | .venv/bin/python ops/pictures/capture.py > ops/pictures/demo.svg
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

COMMAND = "[bold green]$[/] sh ops/scripts/demo"


def picture(ansi: str, *, width: int = 110) -> str:
    """The SVG of `ansi`, without the empty lines at its end."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(COMMAND)
    console.print(Text.from_ansi(ansi.rstrip()))
    svg = console.export_svg(title="sluice")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no fonts from elsewhere: any monospace will do


if __name__ == "__main__":
    print(picture(sys.stdin.read()))
