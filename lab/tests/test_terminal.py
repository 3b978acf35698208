# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/terminal.py."""

import io
import os
import unittest
from unittest import mock

from lab import terminal


class Screen(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def environment(**variables: str):
    """The environment with TERM and NO_COLOR as they are named, or unset."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ('TERM', 'NO_COLOR')}
    return mock.patch.dict(os.environ, dict(kept, **variables), clear=True)


class Terminal(unittest.TestCase):
    """Colour and replaced lines are for terminals only."""

    def test_colour(self) -> None:
        """On a terminal."""
        with environment(TERM='xterm'):
            self.assertEqual(terminal.paint('no', terminal.RED, Screen()),
                             '\x1b[31mno\x1b[0m')

    def test_no_colour(self) -> None:
        """Not in a file, not on a dumb terminal, not with NO_COLOR."""
        with environment(TERM='xterm'):
            self.assertEqual(terminal.paint('no', terminal.RED, io.StringIO()), 'no')
        with environment(TERM='dumb'):
            self.assertEqual(terminal.paint('no', terminal.RED, Screen()), 'no')
        with environment():
            self.assertEqual(terminal.paint('no', terminal.RED, Screen()), 'no')
        with environment(TERM='xterm', NO_COLOR='1'):
            self.assertEqual(terminal.paint('no', terminal.RED, Screen()), 'no')

    def test_status(self) -> None:
        """The line is cut to the width, and cleared once."""
        screen = Screen()
        with environment(TERM='xterm', COLUMNS='10'):
            status = terminal.Status(screen)
            status.show('a long line of text')
            status.clear()
            status.clear()
        self.assertEqual(screen.getvalue(), '\r\x1b[Ka long li\r\x1b[K')

    def test_no_status(self) -> None:
        """Nothing of it in a file."""
        file = io.StringIO()
        with environment(TERM='xterm'):
            status = terminal.Status(file)
            status.show('text')
            status.clear()
        self.assertEqual(file.getvalue(), '')
