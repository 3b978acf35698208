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
from typing import Dict, List, Optional, Tuple

from lab import UserError, memory
from lab.outcome import Unavailable
from lab.cli import (add_qemu_arguments, guest_size, memory_floor, ready,
                     run_main, say, say_failed)
from lab.measure import report
from lab.memory import GIB, MIB, format_size
from lab.measure.once import (DESTINATION_ALLOWANCE, MigrateConfig, Pressure,
                              Probe, Result, migrate_once,
                              migrate_under_pressure, probe)
from lab.migrate import MigrationFailed
from lab.qemu import GuestError, pick_accelerator

# What a destination that is short of memory gets on top of the guest's data:
# for QEMU itself
PRESSURE_ALLOWANCE = 256 * MIB


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n', 1)[0])
    add_qemu_arguments(parser)
    parser.add_argument('--source-binary', metavar='FILE',
                        help='let this QEMU be the source of the migrations '
                             'whose destination is the patched one')
    parser.add_argument('--size', type=guest_size, default=256 * GIB,
                        help='guest RAM for the patched QEMU (default 256G)')
    parser.add_argument('--stock-size', type=guest_size, default=4 * GIB,
                        help='guest RAM where it fills up (default 4G); '
                             'less is taken if memory is short')
    parser.add_argument('--capability', metavar='NAME', action='append',
                        default=[], dest='capabilities',
                        help='migration capability to set with the patched '
                             'QEMU, e.g. multifd (can be repeated)')
    parser.add_argument('--json', metavar='FILE',
                        help='write all numbers to this file')
    return parser.parse_args()


def check_json(path: Optional[str]) -> None:
    """Raise UserError if the file could not be written, before the work."""
    if path:
        try:
            with open(path, 'a', encoding='utf-8'):
                pass
        except OSError as err:
            raise UserError(f'cannot write {path}: {err.strerror}') from err


def largest_mappable(size: int) -> int:
    """size, or half of it, ... as far as this machine lets one map that."""
    why = memory.check_mappable(size)
    if not why:
        return size
    smaller = memory.halve_until(
        size, lambda each: not memory.check_mappable(each))
    say(f'A memfd of {format_size(size)} cannot be mapped here: {why}. '
        f'Taking {format_size(smaller)} instead.')
    return smaller


def survivable(wanted: int, available: int, floor: int) -> int:
    """The size, at most wanted, at which both sides may fill up entirely.

    All in bytes.  floor is what has to stay available.
    """
    return memory.halve_until(wanted,
                              lambda size: 2 * size + floor <= available)


def plan(wanted: int, fitting: int, probed: Probe) -> List[MigrateConfig]:
    """Which migrations to do with the patched QEMU.

    Takes for granted that whoever does not keep holes fills up.  Only the
    fields that matter here are set in what is returned.
    """
    full = MigrateConfig('', '', wanted)
    small = MigrateConfig('', '', fitting)
    if not probed.destination_keeps_holes:
        return [small]
    if not probed.source_keeps_holes:
        if fitting >= wanted:
            return [small]
        # Anonymous RAM does not fill up, it reads as the zero page: with it
        # on the source, the destination can be shown at full size
        return [replace(full, source_backend='anonymous'), small]
    return [full]


def explain(probed: Probe, wanted: int, planned: List[MigrateConfig]) -> str:
    """Say why it is not simply one migration at full size, if it is not."""
    if probed.source_keeps_holes and probed.destination_keeps_holes:
        return ''
    if probed.source_keeps_holes:
        who = 'destination allocates'
    elif probed.destination_keeps_holes:
        who = 'source allocates'
    else:
        who = 'source and the destination allocate'
    text = (f'With the patched QEMU the {who} all the RAM that the migration '
            f'looks at (measured just now with a small guest), and '
            f'{format_size(wanted)} could exhaust the machine.')
    if len(planned) > 1:
        text += (f' Therefore the guest of {format_size(wanted)} has '
                 'anonymous RAM, which does not fill up, on the source, and a '
                 'memfd only on the destination; the guest with a memfd on '
                 f'both sides has {format_size(planned[-1].size)}.')
    elif planned[0].size < wanted:
        text += (f' Therefore the guest has {format_size(planned[0].size)} '
                 'here.')
    return text


def run(args: argparse.Namespace) -> int:
    """All of it; returns the exit status."""
    ready(args, args.source_binary)
    check_json(args.json)

    floor = memory_floor()
    fitting = survivable(args.stock_size, memory.available(), floor)
    if fitting < args.stock_size:
        say(f'Only {memory.available() // MIB} MiB of memory are available: '
            f'taking {format_size(fitting)} where RAM fills up.')
    if memory.available() < 2 * fitting + floor:
        raise UserError(f'only {memory.available() // MIB} MiB of memory are '
                        f'available, {(2 * fitting + floor) // MIB} MiB are '
                        'needed: free some first')
    wanted = largest_mappable(args.size)

    patched = MigrateConfig(
        source_binary=args.source_binary or args.patched,
        destination_binary=args.patched, size=wanted,
        accel=args.accel or pick_accelerator(),
        mode=MigrateConfig.mode.also(*args.capabilities),
        extra_args=tuple(args.qemu_args), memory_floor=floor)
    probed = probe(patched)
    planned = plan(wanted, min(fitting, wanted), probed)
    explanation = explain(probed, wanted, planned)
    if explanation:
        say(explanation)

    todo = [('patched', replace(patched, size=part.size,
                                source_backend=part.source_backend))
            for part in planned]
    if planned == [MigrateConfig('', '', wanted)] and not args.capabilities:
        todo += [('patched, sparse-ram',
                  replace(patched, mode=patched.mode.also('sparse-ram')))]
    todo += [('stock', replace(patched, source_binary=args.stock,
                               destination_binary=args.stock,
                               size=min(fitting, wanted),
                               mode=MigrateConfig.mode))]

    results = migrate_all(todo)
    if results:
        print(report.results_table(results))
        print()
        print(report.in_words(results, explanation))
    if args.json:
        report.write_json(args.json, results, probe=vars(probed))
    pressures = try_pressure(
        {'patched': replace(patched, size=min(fitting, wanted)),
         'stock': todo[-1][1]})
    if pressures:
        print()
        print('The destination in a memory cgroup, limited to the data and '
              f'{format_size(PRESSURE_ALLOWANCE)}:')
        print()
        print(report.pressure_table(pressures))
    failed = sum(map(len, results.values())) < len(todo)
    return max(int(failed), judge(results), judge_pressure(pressures))


def migrate_all(todo: List[Tuple[str, MigrateConfig]]) \
        -> Dict[str, List[Result]]:
    """Returns the results by name, without those migrations that failed."""
    results: Dict[str, List[Result]] = {}
    for name, config in todo:
        say(f'{name}: {format_size(config.size)} of RAM, '
            f'{config.source_backend} to {config.destination_backend}, '
            f'idle guest (the firmware has booted), {config.accel}')
        try:
            result = migrate_once(config, lambda text: say(f'  {text}'))
        except (MigrationFailed, GuestError) as err:
            say_failed(f'{name}, {format_size(config.size)}: {err}')
        else:
            results.setdefault(name, []).append(result)
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
    if not patched or (patched.result
                       and patched.result.comparison.identical):
        return 0
    say_failed('patched: with a limit of '
               f'{report.mib(patched.limit)} MiB the destination '
               + ('has other RAM than the source' if patched.result
                  else 'was killed'))
    return 1


def judge(results: Dict[str, List[Result]]) -> int:
    """Say what is wrong; returns the exit status."""
    status = 0
    for name, runs in results.items():
        for result in runs:
            what = f'{name}, {format_size(result.config.size)}'
            if not result.comparison.identical:
                say_failed(
                    f'{what}: {result.comparison.differing_pages} '
                    'pages of RAM differ, the first at offset '
                    f'{result.comparison.first_difference:#x}')
                status = 1
            if name != 'stock' and not result.destination_is_sparse:
                say_failed(
                    f'{what}: the destination grew by '
                    f'{report.mib(result.destination_growth)} MiB, over '
                    f'{report.mib(result.destination_bound)} MiB, which is '
                    'what the guest had plus '
                    f'{DESTINATION_ALLOWANCE // MIB} MiB')
                status = 1
    return status


if __name__ == '__main__':
    sys.exit(run_main('demo', lambda: run(parse_args())))
