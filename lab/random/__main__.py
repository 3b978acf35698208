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
import sys
import textwrap
import time
from typing import List, Optional, Tuple

from lab import cli, jobs
from lab.random.case import PATCHED, STOCK, draw
from lab.outcome import Outcome
from lab.random.machine import Setup
from lab.random.run import run_case

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


def _details(seed: int, outcome: Outcome) -> str:
    """All that can be said about it."""
    return '\n'.join(filter(None, (
        str(draw(seed)), textwrap.indent(outcome.reason, '    '),
        f'  to repeat: python3 -m lab.random --verbose --seed {seed}')))


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
    tally = jobs.Tally(args.tap, args.verbose)
    # Processes, because the setting of huge pages is a process's
    for seed, outcome in jobs.side_by_side(
            _run_seed, jobs.within(seeds, args.seconds), args.jobs, processes=True):
        tally.add(outcome, _details(seed, outcome))
    return tally.close()


if __name__ == '__main__':
    sys.dont_write_bytecode = True
    sys.exit(cli.run_main('random-migrations', run))
