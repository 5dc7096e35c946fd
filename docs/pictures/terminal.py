"""Draw what a command printed on a terminal, as it is in the README.

script -qc "COLUMNS=100 dspa demo smollm2" /dev/null | python docs/pictures/terminal.py TITLE > docs/pictures/demo.svg
"""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 100


def draw(printed: str, title: str) -> str:
    """Return an SVG of ANSI text, of each progress bar as it ended."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in printed.replace("\r\n", "\n").splitlines():
        console.print(Text.from_ansi(line.rstrip("\r").rpartition("\r")[2]), soft_wrap=True)
    # The pages load nothing from elsewhere, such as fonts.
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)


if __name__ == "__main__":
    print(draw(sys.stdin.read(), sys.argv[1]))
