# SPDX-License-Identifier: GPL-2.0-or-later
"""Many cases that are drawn from seeds, side by side."""

import argparse
import multiprocessing
import time
from concurrent.futures import (FIRST_COMPLETED, Future, ProcessPoolExecutor,
                                ThreadPoolExecutor, wait)
from itertools import islice
from typing import Any, Callable, Iterable, Iterator, Optional, Set, TypeVar

from lab import host, memory
from lab.memory import GIB

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
    parser.add_argument('--verbose', action='store_true',
                        help='print what is done')


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
