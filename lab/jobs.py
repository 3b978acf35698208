# SPDX-License-Identifier: GPL-2.0-or-later
"""Many cases that are drawn from seeds, side by side, and what comes of them."""

import argparse
import multiprocessing
import time
from collections import Counter
from concurrent.futures import (FIRST_COMPLETED, Future, ProcessPoolExecutor,
                                ThreadPoolExecutor, wait)
from itertools import islice
from typing import Any, Callable, Iterable, Iterator, List, Optional, Set, TypeVar

from lab import host, memory
from lab.memory import GIB
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome

_PROGRESS = 30.0                # seconds between lines that say how far it is

_Task = TypeVar('_Task')
_Result = TypeVar('_Result')


def fitting(needed: int = 1 * GIB) -> int:
    """How many jobs this machine can do at a time; needed: bytes, for each."""
    return max(1, min(host.cpus(), memory.available() // needed))


def add_arguments(parser: argparse.ArgumentParser, what: Any) -> None:
    """Which cases to run, and how; what: a group that one argument is taken of."""
    what.add_argument('--seed', type=int, metavar='N', help='this case only')
    what.add_argument('--cases', type=int, metavar='N', default=100,
                      help='so many drawn cases (default: 100)')
    parser.add_argument('--first', type=int, metavar='SEED', default=int(time.time()),
                        help='seed of the first drawn case, of which the others '
                             'follow (default: the time; it is printed)')
    parser.add_argument('--seconds', type=float, metavar='N',
                        help='start no case after this time')
    parser.add_argument('--jobs', type=int, metavar='N', default=fitting(),
                        help='cases at a time (default: as many as CPUs and '
                             'memory allow)')
    parser.add_argument('--tap', action='store_true',
                        help='print a line of TAP for each case')
    parser.add_argument('--verbose', action='store_true', help='print what is done')


def within(tasks: Iterable[_Task], seconds: Optional[float]) -> Iterator[_Task]:
    """The tasks that are asked for before so many seconds are over."""
    deadline = time.monotonic() + seconds if seconds else None
    for task in tasks:
        if deadline and time.monotonic() > deadline:
            return
        yield task


def side_by_side(run: Callable[[_Task], _Result], tasks: Iterable[_Task],
                 jobs: int, processes: bool = False) -> Iterator[_Result]:
    """What comes of each task, as it comes.

    A task is taken from tasks when there is room for it.  Whoever wants no more
    results waits for the tasks that have begun.

    jobs: tasks at a time
    processes: run them in processes that are forked, and not in threads
    """
    pool = (ProcessPoolExecutor(jobs, multiprocessing.get_context('fork'))
            if processes else ThreadPoolExecutor(jobs))
    tasks = iter(tasks)
    running: Set['Future[_Result]'] = set()
    with pool:
        while True:
            running |= {pool.submit(run, task)
                        for task in islice(tasks, jobs - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


class Tally:
    """Counts outcomes, and prints them as they come."""

    def __init__(self, tap: bool, verbose: bool):
        """tap: all of them, as TAP; verbose: all of them, else what has failed"""
        self._tap = tap
        self._verbose = verbose
        self._outcomes: List[Outcome] = []
        self._began = self._said = time.monotonic()

    def count(self, status: str) -> int:
        """How many had this one."""
        return sum(outcome.status == status for outcome in self._outcomes)

    def add(self, outcome: Outcome, details: str) -> None:
        """One more; details: what there is to say of it."""
        self._outcomes.append(outcome)
        failed = outcome.status == FAILED
        if self._tap:
            print(outcome.tap(len(self._outcomes), details if failed else ''),
                  flush=True)
        elif failed or self._verbose:
            print(f'{"FAILED" if failed else f"{outcome.seconds:5.1f} s"} '
                  f'{outcome.name}: {details}', flush=True)
        elif time.monotonic() - self._said > _PROGRESS:
            self._said = time.monotonic()
            print(f'... {self}', flush=True)

    def __str__(self) -> str:
        return ', '.join(f'{self.count(status)} {status}'
                         for status in (PASSED, FAILED, SKIPPED))

    def _summary(self) -> Iterator[str]:
        skipped = Counter(outcome.reason for outcome in self._outcomes
                          if outcome.status == SKIPPED)
        for reason, count in skipped.items():
            yield f'skipped {count}: {reason}'
        took = time.monotonic() - self._began
        slowest = ', '.join(
            f'{outcome.name} ({outcome.seconds:.1f} s)' for outcome in sorted(
                self._outcomes, key=lambda each: -each.seconds)[:3])
        yield (f'{len(self._outcomes)} cases in {took:.0f} seconds, '
               f'{len(self._outcomes) / took * 3600:.0f} an hour; the slowest: '
               f'{slowest}')
        failed = [outcome.name for outcome in self._outcomes
                  if outcome.status == FAILED]
        if failed:
            yield f'failed: {", ".join(failed)}'

    def close(self, more: str = '') -> int:
        """Prints the sum, after what else there is to say; the exit status."""
        lines = [*more.splitlines(), *self._summary()]
        if self._tap:
            lines = [*(f'# {line}' for line in lines), f'1..{len(self._outcomes)}']
        print('\n'.join([*lines, *(() if self._tap else (str(self),))]), flush=True)
        return 1 if self.count(FAILED) or not self.count(PASSED) else 0
