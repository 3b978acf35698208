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
from typing import Iterable, Iterator, List, Tuple

from lab import UserError, cli, jobs, qemu
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
    jobs.add_arguments(parser, what)
    what.add_argument('--fixed', action='store_true',
                      help='a few cases that always are the same')
    what.add_argument('--live', type=int, metavar='N',
                      help='so many cases with a guest that runs')
    parser.add_argument('--fault', action='append', default=[],
                        choices=cases.FAULTS, help='only this kind of fault')
    parser.add_argument('--mode', action='append', default=[],
                        choices=list(cases.MODES), help='only this mode')
    parser.add_argument('--name', help='of --fixed, only those whose names '
                                       'contain this')
    parser.add_argument('--repeat', type=int, default=1, help='each case so many times')
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
    cli.add_qemu_arguments(parser)
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> Iterator[Named]:
    """The cases to run, with names."""
    if args.seed is not None:
        seeds: Iterable[int] = [args.seed]
    elif args.fixed:
        return (each for each in cases.fixed() if not args.name or args.name in each[0])
    else:
        cli.say(f'faults: --first {args.first}')
        if args.live is not None:
            return ((f'live-{seed}', live.draw(seed)[0])
                    for seed in range(args.first, args.first + args.live))
        seeds = (case.seed for case in itertools.islice(
            cases.drawn(args.first, args.fault, args.mode), args.cases))
    return ((f'seed-{seed}', cases.draw(seed)) for seed in seeds)


def run_all(args: argparse.Namespace, tools: Tools) -> int:
    """Run what was chosen, side by side; returns the exit status."""
    def run_one(named: Named) -> Tuple[str, Result]:
        name, case = named
        if args.live is not None:
            return name, live.run_live(case.seed, tools)
        result = run_case(case, tools)
        # One that is drawn need not come to that
        never = [call for call, count in result.failed_calls.items() if not count]
        if args.fixed and never and not result.complaint:
            result.skipped = f'never made: {", ".join(never)}'
        return name, result

    tally = jobs.Tally(args.tap, args.verbose)
    results: List[Result] = []
    todo = (named for named in chosen(args) for _ in range(args.repeat))
    for name, result in jobs.side_by_side(
            run_one, jobs.within(todo, args.seconds), args.jobs):
        results.append(result)
        tally.add(result.outcome_of(name), report.details(result))
    return tally.close(report.summary(results))


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
    return run_all(args, tools)


if __name__ == '__main__':
    sys.exit(cli.run_main('faults', run))
