# SPDX-License-Identifier: GPL-2.0-or-later
"""Test cases that are made from tables, reported in TAP."""

import argparse
import re
import traceback
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Callable, Sequence

from lab import UserError
from lab.cli import add_qemu_arguments


class Skip(Exception):
    """A case that cannot be run here; says why."""


class Failure(Exception):
    """Something that is not as it has to be."""


@dataclass(frozen=True)
class Case:
    """One case.

    run: raises Failure, Skip, or what lab.cli.run_main() knows.
    quick: one of those that are run if there is little time.
    """
    name: str
    run: Callable[[], None]
    quick: bool = False


def expect(good: bool, what: str) -> None:
    """Raise Failure, which says what, unless good."""
    if not good:
        raise Failure(what)


def one_line(err: BaseException) -> str:
    """For TAP, in which # starts a directive."""
    return re.sub(r'[\s#]+', ' ', str(err) or repr(err)).strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases to run, with which QEMUs."""
    add_qemu_arguments(parser)
    parser.add_argument('--quick', action='store_true',
                        help='run a few cases only')
    parser.add_argument('--list', action='store_true',
                        help='list the cases, and end')
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
        line, end = f'ok {number} - {case.name}', ''
        try:
            case.run()
        except Skip as err:
            end = f' # SKIP {one_line(err)}'
        except Exception as err:    # pylint: disable=broad-except
            failures += 1
            for text in traceback.format_exc().splitlines():
                print(f'# {text}')
            line, end = f'not {line}', f' - {one_line(err)}'
        print(line + end, flush=True)
    return 1 if failures else 0
