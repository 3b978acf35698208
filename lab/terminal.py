# SPDX-License-Identifier: GPL-2.0-or-later
"""Colour, and lines that replace each other, where there is a terminal.

There is neither in a file or a pipe, and no colour if NO_COLOR is set to
anything (no-color.org).
"""

import os
import shutil
from typing import TextIO

RED = '31'
GREEN = '32'
YELLOW = '33'


def is_terminal(stream: TextIO) -> bool:
    """Whether a line that was written can be replaced."""
    return stream.isatty() and os.environ.get('TERM', 'dumb') != 'dumb'


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour, or as it is; it has the same width."""
    if not is_terminal(stream) or os.environ.get('NO_COLOR'):
        return text
    return f'\x1b[{colour}m{text}\x1b[0m'


class Status:
    """One line that says what is going on, below everything else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = False

    def show(self, text: str) -> None:
        """Replaces the line."""
        if is_terminal(self._stream):
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f'\r\x1b[K{text[:width]}')
            self._stream.flush()
            self._shown = True

    def clear(self) -> None:
        """To be called before anything else is written."""
        if self._shown:
            self._stream.write('\r\x1b[K')
            self._shown = False
