# SPDX-License-Identifier: GPL-2.0-or-later
"""Show what migration does to a guest whose RAM is a memfd.

Migrates an idle guest between two QEMU processes of this machine, with the
patched QEMU and with the stock one, and prints what both sides have allocated
before and after.  Progress goes to standard error, the table, which is
reStructuredText, to standard output.

Exit status: 0 if all is as it should be; 1 if the two guests' RAM differs, or
the patched destination allocated more than the guest had, or a migration did
not complete; 2 for a mistake on the command line or something missing.
"""

import argparse
import sys
from dataclasses import replace
from typing import Dict

from lab import UserError, memory
from lab.outcome import Unavailable
from lab.cli import (add_qemu_arguments, add_size_arguments, memory_floor,
                     ready, run_main, say, say_failed)
from lab.measure import report
from lab.memory import GIB, MIB, format_size
from lab.measure.once import (DESTINATION_ALLOWANCE, MigrateConfig, Pressure,
                              Result, migrate_once, migrate_under_pressure)
from lab.migrate import MigrationFailed
from lab.qemu import GuestError, pick_accelerator

# What a destination that is short of memory gets on top of the guest's data:
# for QEMU itself
PRESSURE_ALLOWANCE = 256 * MIB


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n', 1)[0])
    add_qemu_arguments(parser)
    add_size_arguments(parser, 256 * GIB, 4 * GIB)
    return parser.parse_args()


def largest_mappable(size: int) -> int:
    """size, or half of it, ... as far as this machine lets one map that."""
    smaller = memory.largest_mappable(size)
    if smaller < size:
        say(f'A memfd of {format_size(size)} cannot be mapped here: '
            f'{memory.check_mappable(size)}. '
            f'Taking {format_size(smaller)} instead.')
    return smaller


def run(args: argparse.Namespace) -> int:
    """All of it; returns the exit status."""
    ready(args)

    floor = memory_floor()
    fitting = memory.survivable(args.stock_size, memory.available(), floor)
    if fitting < args.stock_size:
        say(f'Only {memory.available() // MIB} MiB of memory are available: '
            f'taking {format_size(fitting)} where RAM fills up.')
    if memory.available() < 2 * fitting + floor:
        raise UserError(f'only {memory.available() // MIB} MiB of memory are '
                        f'available, {(2 * fitting + floor) // MIB} MiB are '
                        'needed: free some first')
    wanted = largest_mappable(args.size)

    patched = MigrateConfig(
        args.patched, wanted, accel=args.accel or pick_accelerator(),
        extra_args=tuple(args.qemu_args), memory_floor=floor)
    small = replace(patched, size=min(fitting, wanted))
    stock = replace(small, binary=args.stock)
    todo = {'patched': patched,
            'patched, sparse-ram': replace(
                patched, mode=patched.mode.also('sparse-ram')),
            'stock': stock}

    results = migrate_all(todo)
    if results:
        print(report.results_table(results))
        print()
        print(report.in_words(results))
    pressures = try_pressure({'patched': small, 'stock': stock})
    if pressures:
        print()
        print('The destination in a memory cgroup, limited to the data and '
              f'{format_size(PRESSURE_ALLOWANCE)}:')
        print()
        print(report.pressure_table(pressures))
    return max(int(len(results) < len(todo)), judge(results), judge_pressure(pressures))


def migrate_all(todo: Dict[str, MigrateConfig]) -> Dict[str, Result]:
    """Returns the results by name, without those migrations that failed."""
    results: Dict[str, Result] = {}
    for name, config in todo.items():
        say(f'{name}: {format_size(config.size)} of RAM, memfd, '
            f'idle guest (the firmware has booted), {config.accel}')
        try:
            results[name] = migrate_once(config, lambda text: say(f'  {text}'))
        except (MigrationFailed, GuestError) as err:
            say_failed(f'{name}, {format_size(config.size)}: {err}')
    return results


def try_pressure(configs: Dict[str, MigrateConfig]) -> Dict[str, Pressure]:
    """Migrate to destinations that are short of memory."""
    pressures = {}
    for name, config in configs.items():
        limit = config.data + PRESSURE_ALLOWANCE
        say(f'{name}: {format_size(config.size)} of RAM, the destination '
            f'limited to {format_size(limit)} of memory')
        try:
            pressures[name] = migrate_under_pressure(
                config, limit, lambda text: say(f'  {text}'))
        except Unavailable as err:
            say(f'Not shown: {err}.')
            break
    return pressures


def judge_pressure(pressures: Dict[str, Pressure]) -> int:
    """Say what is wrong; returns the exit status."""
    patched = pressures.get('patched')
    if not patched or (patched.result and patched.result.comparison.identical):
        return 0
    say_failed('patched: with a limit of '
               f'{report.mib(patched.limit)} MiB the destination '
               + ('has other RAM than the source' if patched.result
                  else 'was killed'))
    return 1


def judge(results: Dict[str, Result]) -> int:
    """Say what is wrong; returns the exit status."""
    status = 0
    for name, result in results.items():
        what = f'{name}, {format_size(result.config.size)}'
        if not result.comparison.identical:
            say_failed(f'{what}: {result.comparison}')
            status = 1
        if name != 'stock' and not result.destination_is_sparse:
            say_failed(f'{what}: the destination grew by '
                       f'{report.mib(result.destination_growth)} MiB, over '
                       f'{report.mib(result.destination_bound)} MiB, which is '
                       f'what the guest had plus {DESTINATION_ALLOWANCE // MIB} '
                       'MiB')
            status = 1
    return status


if __name__ == '__main__':
    sys.exit(run_main('demo', lambda: run(parse_args())))
