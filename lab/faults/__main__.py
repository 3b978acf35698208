# SPDX-License-Identifier: GPL-2.0-or-later
"""Let migrations fail in all ways, and see that no guest is lost.

A case is one migration with one kind of fault: a side is killed, a channel
breaks after some bytes, the migration is cancelled, or paused, memory runs
out, the kernel refuses what it is asked to do.  What is drawn from a seed is
drawn again from the same seed (--seed), though the moment of what happens
after seconds is not exactly the same twice.

What has to hold: the source has what it had, byte for byte, and runs on,
unless the destination has run already; a destination has exactly what the
source had, or does not run; nothing hangs, nothing crashes; after that the
same source migrates to another destination.
"""

import argparse
import itertools
import os
import sys
import threading
import time
from concurrent.futures import (FIRST_COMPLETED, Future, ThreadPoolExecutor,
                                wait)
from typing import Iterator, List, Optional, Set, Tuple

from lab import UserError, cli, host, qemu
from lab.base import BUILD
from lab.faults import cases, known, live, report
from lab.faults.attempt import Ending
from lab.faults.cases import Case
from lab.faults.run import TIMEOUT, Result, Tools, run_case
from lab.faults.sides import Side

Named = Tuple[str, Case]

# What make check runs must not take a slow machine for a QEMU that hangs, and with
# few cases this costs next to nothing
_FIXED_HANG_SECONDS = 10.0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python3 -m lab.faults',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--seed', type=int, help='this case only')
    what.add_argument('--cases', type=int, metavar='N', default=100,
                      help='so many drawn cases (default: 100)')
    what.add_argument('--fixed', action='store_true',
                      help='a few cases that always are the same')
    what.add_argument('--live', type=int, metavar='N',
                      help='so many cases with a guest that runs')
    parser.add_argument('--first', type=int, metavar='SEED',
                        help='seed of the first drawn case (default: the '
                             'time)')
    parser.add_argument('--seconds', type=float,
                        help='start no more cases after this time')
    parser.add_argument('--fault', action='append', default=[],
                        choices=cases.FAULTS, help='only this kind of fault')
    parser.add_argument('--mode', action='append', default=[],
                        choices=list(cases.MODES), help='only this mode')
    parser.add_argument('--name', help='of --fixed, only those whose names '
                                       'contain this')
    parser.add_argument('--repeat', type=int, default=1,
                        help='each case so many times')
    parser.add_argument('--jobs', type=int,
                        default=host.cpus(),
                        help='cases at a time (default: one a CPU)')
    parser.add_argument('--library', metavar='FILE',
                        default=f'{BUILD}/rig/fail-calls.so',
                        help='what lets system calls fail')
    parser.add_argument('--timeout', type=float, default=TIMEOUT,
                        metavar='SECONDS', help='for the migrations of a case '
                        f'(default: {TIMEOUT:g})')
    parser.add_argument('--gdb', action='store_true',
                        help='say with gdb where a QEMU that hangs is')
    parser.add_argument('--spoil', action='store_true',
                        help='change a few bytes of RAM after each migration: '
                             'all cases with a side that is left '
                             'have to fail')
    parser.add_argument('--not-sparse', action='store_true',
                        help='RAM need not stay sparse: for --patched STOCK')
    parser.add_argument('--tap', action='store_true',
                        help='print a line of TAP for each case')
    parser.add_argument('--verbose', action='store_true',
                        help='describe each case')
    cli.add_qemu_arguments(parser)
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> Iterator[Named]:
    """The cases to run, with names."""
    if args.seed is not None:
        named: Iterator[Named] = iter([(f'seed-{args.seed}',
                                        cases.draw(args.seed))])
    elif args.fixed:
        named = iter([(name, case) for name, case in cases.fixed()
                      if not args.name or args.name in name])
    else:
        first = args.first if args.first is not None else int(time.time())
        cli.say(f'faults: --first {first}')
    if args.live is not None:
        named = iter([(f'live-{seed}', live.draw(seed)[0])
                      for seed in range(first, first + args.live)])
    elif args.seed is None and not args.fixed:
        named = ((f'seed-{case.seed}', case) for case in itertools.islice(
            cases.drawn(first, args.fault, args.mode), args.cases))
    for name, case in named:
        for _ in range(args.repeat):
            yield name, case


class Printer:
    """Says what came of each case, as it comes."""

    def __init__(self, tap: bool, verbose: bool):
        self._tap = tap
        self._verbose = verbose
        self._lock = threading.Lock()
        self._number = 0

    def say(self, name: str, result: Result) -> None:
        """One more."""
        with self._lock:
            self._number += 1
            if self._tap:
                print(result.outcome_of(name).tap(self._number, (
                    report.failure(result, name) if result.complaint else '')),
                    flush=True)
            elif result.complaint:
                print(report.failure(result, name), flush=True)
            if self._verbose and not result.complaint:
                print(f'{result.seconds:5.1f} s  {result.outcome or "skipped"}'
                      f': {result.case.describe()}', flush=True)


def run_all(args: argparse.Namespace, tools: Tools) -> List[Result]:
    """Run what was chosen, side by side."""
    printer = Printer(args.tap, args.verbose)
    results: List[Result] = []
    todo = chosen(args)
    deadline = time.monotonic() + args.seconds if args.seconds else None
    running: Set['Future[Tuple[str, Result]]'] = set()

    def run_one(name: str, case: Case) -> Tuple[str, Result]:
        if args.live is not None:
            return name, live.run_live(case.seed, tools)
        result = run_case(case, tools)
        # One that is drawn need not come to that
        if args.fixed and case.fault == 'calls' and not (
                result.complaint or sum(result.failed_calls.values())):
            result.skipped = result.skipped or 'the call was never made'
        return name, result

    def next_one() -> Optional[Named]:
        if deadline and time.monotonic() > deadline:
            return None
        return next(todo, None)

    with ThreadPoolExecutor(args.jobs) as pool:
        more = True
        while more or running:
            while more and len(running) < args.jobs:
                named = next_one()
                more = named is not None
                if named:
                    running.add(pool.submit(run_one, *named))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name, result = future.result()
                results.append(result)
                printer.say(name, result)
    return results


def spoil(source: Side, destination: Side, ending: Ending) -> None:
    """Change bytes of who has the guest now, to see that it is noticed."""
    side = destination if ending.destination == 'completed' else source
    if side.ended() is None:
        side.write(side.size // 2, os.urandom(16))


def run() -> int:
    """Run what the command line says."""
    args = parse_args()
    cli.check_binaries([args.patched])
    if not os.access(args.library, os.R_OK):
        raise UserError(f"there is no {args.library}: run 'make rig' first")
    qemu.import_qemu(args.qemu_python)
    Side.use_gdb = args.gdb
    tools = Tools(args.patched, args.library, tuple(args.qemu_args),
                  args.timeout,
                  _FIXED_HANG_SECONDS if args.fixed else known.HANG_SECONDS,
                  not args.not_sparse, spoil if args.spoil else None)
    began = time.monotonic()
    results = run_all(args, tools)
    text = report.summary(results, time.monotonic() - began)
    print('\n'.join(f'# {line}' for line in text.splitlines()) if args.tap
          else text)
    if args.tap:
        print(f'1..{len(results)}')
    return 1 if any(result.complaint for result in results) else 0


if __name__ == '__main__':
    sys.exit(cli.run_main('faults', run))
