# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of a test, and of what it needs."""

import re
import signal
from dataclasses import dataclass

PASSED, FAILED, SKIPPED = 'passed', 'failed', 'skipped'


class Unavailable(Exception):
    """This machine does not have what is needed; says what."""


class Wrong(Exception):
    """Something that has to hold does not; says what."""


def expect(good: bool, what: str) -> None:
    """Raise Wrong, which says what, unless good."""
    if not good:
        raise Wrong(what)


def ending(status: int) -> str:
    """How a process ended, in words; status: negative for a signal."""
    if status >= 0:
        return f'exit status {status}'
    try:
        return f'killed by {signal.Signals(-status).name}'
    except ValueError:
        return f'killed by signal {-status}'


@dataclass
class Outcome:
    """What became of one test."""
    name: str
    status: str
    reason: str = ''
    seconds: float = 0.0
    # Whether the program itself said so, or it is what its end tells
    reported: bool = False
    # Where its output is, if the caller has said
    log: str = ''

    def tap(self, number: int, details: str = '') -> str:
        """As TAP, with the first line of the reason, in which # would start a
        directive; details come before, as comments.
        """
        first = self.reason.strip().partition('\n')[0]
        reason = re.sub(r'[\s#]+', ' ', first).strip()
        end = (f' # SKIP {reason}' if self.status == SKIPPED
               else f' - {reason}' if reason else '')
        return ''.join([*(f'# {line}\n' for line in details.splitlines()),
                        'not ' if self.status == FAILED else '',
                        f'ok {number} - {self.name}{end}'])
