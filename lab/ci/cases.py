# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases that are made from tables, reported in TAP."""

import argparse
import traceback
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Callable, Sequence

from lab import UserError
from lab.cli import add_qemu_arguments
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, Unavailable


@dataclass(frozen=True)
class Case:
    """One case.

    run: raises Wrong, Unavailable, or what lab.cli.run_main() knows.
    quick: one of those that are run if there is little time.
    """
    name: str
    run: Callable[[], None]
    quick: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases to run, with which QEMUs."""
    add_qemu_arguments(parser)
    parser.add_argument('--quick', action='store_true', help='run a few cases only')
    parser.add_argument('--list', action='store_true', help='list the cases, and end')
    parser.add_argument('case', nargs='*', metavar='CASE',
                        help="cases to run; a pattern as the shell's for "
                             'files (default: all)')


def run_cases(cases: Sequence[Case], args: argparse.Namespace) -> int:
    """Run those that args (see add_arguments) select; the exit status."""
    chosen = [case for case in cases
              if (case.quick or not args.quick)
              and (not args.case or any(fnmatchcase(case.name, pattern)
                                        for pattern in args.case))]
    if not chosen:
        raise UserError('there is no such case; --list lists them')
    if args.list:
        print('\n'.join(case.name for case in chosen))
        return 0
    print(f'1..{len(chosen)}', flush=True)
    failures = 0
    for number, case in enumerate(chosen, 1):
        outcome, details = Outcome(case.name, PASSED), ''
        try:
            case.run()
        except Unavailable as err:
            outcome = Outcome(case.name, SKIPPED, str(err))
        except Exception as err:
            failures += 1
            details = traceback.format_exc()
            outcome = Outcome(case.name, FAILED, str(err) or repr(err))
        print(outcome.tap(number, details), flush=True)
    return 1 if failures else 0
