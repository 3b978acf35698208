# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate at random, and compare with a model what comes of it.

A case follows from its seed: the backends of guest RAM on both sides, what is
data, zero or a hole there, old content on the destination, capabilities,
parameters and transport, a stock QEMU on one side, and who writes meanwhile.
After the migration every byte of guest RAM is compared with what it has to be,
and it is looked at where there are pages that nobody needs.

What fails is printed with its seed; --seed runs exactly that again, as far as
it does not depend on time.  The last line is "N passed, N failed, N skipped".
"""

import argparse
import collections
import sys
import time
from typing import Dict, List, Optional, Tuple

from lab import cli, jobs
from lab.random.case import PATCHED, STOCK, draw
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome
from lab.random.machine import Setup
from lab.random.run import run_case

_PROGRESS = 30.0                # seconds between lines that say how far it is

_setup: Optional[Setup] = None


def _run_seed(seed: int) -> Tuple[int, Outcome]:
    """In a process of its own."""
    assert _setup
    return seed, run_case(draw(seed), _setup)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python3 -m lab.random',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_arguments(parser, parser.add_mutually_exclusive_group())
    parser.add_argument('--list', action='store_true',
                        help='only print what the cases are')
    parser.add_argument('--sabotage', default='',
                        choices=('stock-destination', 'holes-off'),
                        help='to see it fail: have the stock QEMU, or '
                             'x-ram-holes=off, where that is not expected')
    cli.add_binary_arguments(parser)
    return parser.parse_args()


def seeds_of(args: argparse.Namespace) -> List[int]:
    """Seeds of the cases to run."""
    if args.seed is not None:
        return [args.seed]
    print(f'# {args.cases} cases from seed {args.first} on', flush=True)
    return list(range(args.first, args.first + args.cases))


def _failure(seed: int, outcome: Outcome) -> str:
    """All that can be said about it."""
    return (f'{draw(seed)}\n{_indented(outcome.reason)}\n'
            '  to repeat: python3 -m lab.random --verbose --seed '
            f'{seed}')


class Tally:
    """Counts and prints outcomes."""

    def __init__(self) -> None:
        self.counts: Dict[str, int] = collections.Counter()
        self._skipped: Dict[str, int] = collections.Counter()
        self._began = self._said = time.monotonic()
        self._slowest: List[Tuple[float, int]] = []

    def add(self, seed: int, outcome: Outcome) -> None:
        """One more."""
        self.counts[outcome.status] += 1
        self._slowest = sorted([*self._slowest, (outcome.seconds, seed)],
                               reverse=True)[:3]
        if outcome.status == SKIPPED:
            self._skipped[outcome.reason] += 1
        self._print(seed, outcome)

    def _print(self, seed: int, outcome: Outcome) -> None:
        if outcome.status == FAILED:
            print(f'FAILED {_failure(seed, outcome)}', flush=True)
        if time.monotonic() - self._said > _PROGRESS:
            self._said = time.monotonic()
            print(f'... {self}', flush=True)

    def __str__(self) -> str:
        return ', '.join(f'{self.counts[status]} {status}'
                         for status in (PASSED, FAILED, SKIPPED))

    def close(self) -> int:
        """Prints the sum; returns the exit status."""
        self._print_sum()
        return 1 if self.counts[FAILED] or not self.counts[PASSED] else 0

    def speed(self) -> str:
        """How many in which time, and which of them took long."""
        took = time.monotonic() - self._began
        done = sum(self.counts.values())
        slowest = ', '.join(f'{seed} ({seconds:.1f} s)'
                            for seconds, seed in self._slowest)
        return (f'{done} cases in {took:.0f} seconds, '
                f'{done / took * 3600:.0f} an hour; the slowest: {slowest}')

    def _print_sum(self) -> None:
        for reason, count in self._skipped.items():
            print(f'skipped {count}: {reason}')
        print(self.speed())
        print(self)


class TapTally(Tally):
    """The same as TAP."""

    def _print(self, seed: int, outcome: Outcome) -> None:
        print(outcome.tap(sum(self.counts.values()), (
            _failure(seed, outcome) if outcome.status == FAILED else '')),
            flush=True)

    def _print_sum(self) -> None:
        print(f'# {self.speed()}')
        print(f'1..{sum(self.counts.values())}', flush=True)


def _indented(text: str) -> str:
    return '\n'.join(f'    {line}' for line in text.splitlines())


_BEGAN = time.monotonic()


def _say(text: str) -> None:
    print(f'{time.monotonic() - _BEGAN:8.3f}  {text}', flush=True)


def run() -> int:
    """Run what is named on the command line."""
    global _setup
    args = parse_arguments()
    seeds = seeds_of(args)
    if args.list:
        for seed in seeds:
            print(draw(seed))
        return 0
    cli.ready(args)
    _setup = Setup({PATCHED: args.patched,
                    STOCK: args.stock},
                   floor=cli.memory_floor(), sabotage=args.sabotage,
                   say=_say if args.verbose else lambda _: None)
    tally = TapTally() if args.tap else Tally()
    if len(seeds) == 1 and args.verbose:
        print(draw(seeds[0]))
    # Processes, because the setting of huge pages is a process's
    for result in jobs.side_by_side(_run_seed, jobs.within(seeds, args.seconds),
                                    args.jobs, processes=True):
        tally.add(*result)
    return tally.close()


if __name__ == '__main__':
    sys.dont_write_bytecode = True
    sys.exit(cli.run_main('random-migrations', run))
