# SPDX-License-Identifier: GPL-2.0-or-later
"""What the suites report, and where their logs are."""

import os
import shutil
import sys
import tempfile
import threading
from typing import Dict, List, Optional, TextIO, Tuple

from lab import memory, terminal
from lab.base import BUILD, ROOT
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome

LOGS = os.path.join(BUILD, 'logs/tests')


def shown(path: str) -> str:
    """A path as the user knows it."""
    return os.path.relpath(path, ROOT)


def open_log(suite: str, name: str) -> TextIO:
    """A log for one program."""
    directory = os.path.join(LOGS, suite.replace(' ', '-'))
    os.makedirs(directory, exist_ok=True)
    return open(os.path.join(directory, f'{name}.log'), 'w', encoding='utf-8')


def room_left() -> str:
    """What a test cannot tell of: that there is no room left."""
    free = {where: shutil.disk_usage(where).free
            for where in (ROOT, tempfile.gettempdir(), '/dev/shm')
            if os.path.isdir(where)}
    return ', '.join([f'{memory.available() >> 20} MiB of memory available',
                      *(f'{size >> 20} MiB free in {where}'
                        for where, size in free.items())])


class Report:
    """Collects the outcomes of all suites; prints them as they come."""

    WORDS = {PASSED: ('ok', terminal.GREEN), FAILED: ('FAILED', terminal.RED),
             SKIPPED: ('skipped', terminal.YELLOW)}

    def __init__(self) -> None:
        self.outcomes: List[Tuple[str, Outcome]] = []
        self._lock = threading.Lock()
        self._status = terminal.Status(sys.stdout)
        self._done = 0

    def add(self, suite: str, outcome: Outcome) -> None:
        """One more outcome."""
        word, colour = self.WORDS[outcome.status]
        word = terminal.paint(f'{word:8}', colour, sys.stdout)
        reason = f': {outcome.reason}' if outcome.reason else ''
        with self._lock:
            self.outcomes.append((suite, outcome))
            self._status.clear()
            print(f'{word}{outcome.seconds:6.1f} s  '
                  f'{suite}: {outcome.name}{reason}', flush=True)

    def progress(self, name: str) -> None:
        """One more is done; what became of it comes when its program ends."""
        with self._lock:
            self._done += 1
            self._status.show(f'{self._done} tests done, the last one: {name}')

    def count(self, status: str, suite: Optional[str] = None) -> int:
        """How many had this status."""
        return sum(outcome.status == status and suite in (None, name)
                   for name, outcome in self.outcomes)

    def close(self) -> int:
        """Prints what should not be overlooked, and the sum."""
        for status, title in ((SKIPPED, 'Skipped'), (FAILED, 'Failed')):
            reasons: Dict[str, List[str]] = {}
            for suite, outcome in self.outcomes:
                if outcome.status == status:
                    log = (f' (see {shown(outcome.log)})'
                           if outcome.log and status == FAILED else '')
                    reasons.setdefault(outcome.reason, []).append(
                        f'{suite}: {outcome.name}{log}')
            if reasons:
                self._status.clear()
                print(f'\n{title}:')
            for reason, names in reasons.items():
                print(f'  {reason or "no reason given"}')
                for name in names:
                    print(f'    {name}')
        if self.count(FAILED):
            print(f'\nThe machine: {room_left()}')
        print(f'\n{self.count(PASSED)} passed, {self.count(FAILED)} failed, '
              f'{self.count(SKIPPED)} skipped', flush=True)
        return 1 if self.count(FAILED) else 0
