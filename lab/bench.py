# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure what migration does to guest RAM, with and without the patches.

Every row of the benchmark measures two variants in turns, mostly the stock
and the patched QEMU, and takes the median of the runs: how much RAM and page
tables both sides of an operation allocate, and how long it takes.  The guest
never runs.  The first run of every variant also compares the two guests' RAM.
Progress goes to standard error; the tables, which are reStructuredText, to
standard output; every single value to a JSON file, after every row anew.

Exit status: 0 if everything could be measured, whether or not it reaches its
target; 1 if an operation failed or the guests' RAM differs, and with --check
if a target is missed; 2 for a mistake on the command line or something
missing.
"""

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

from lab import UserError, host, memory
from lab.base import ROOT
from lab.cli import add_qemu_arguments, guest_size, memory_floor, ready, run_main, say
from lab.host import SHM
from lab.measure import report, summary
from lab.measure.operation import MeasureConfig, Measurement, measure
from lab.measure.rows import (ALL, FULL, GROUPS, HARMLESS, IDLE, SCATTERED,
                              SPEED, Row, Variant, select, shrunk)
from lab.measure.summary import RowResult
from lab.memory import GIB, MIB, PAGE_SIZE, SMALLEST
from lab.migrate import MigrationFailed
from lab.qemu import GuestError, pick_accelerator
from lab.ram import HUGE_PAGE

OUTPUT = os.path.join(ROOT, 'build/bench')

# What --save writes
RESULTS = os.path.join(ROOT, 'docs/results')

# --quick: to see that all works, not for figures
QUICK_SIZE = {IDLE: 512 * MIB, FULL: 256 * MIB}
SIZE = {IDLE: 8 * GIB, FULL: 4 * GIB}
RUNS = 5

LEGEND = """\
Medians over the runs. MiB: what was added during the operation; of guest RAM
(st_blocks of its file; with memory-backend-ram, anonymous memory of the
process) and of page tables (VmPTE). RSS: at its highest during the operation,
over that before. total: as QEMU says it. load: until the
second guest has read the file. holes: what query-migrate tells, of what there
was before. ratio: of the medians. spread: the larger interquartile range of
the two variants, in percent of the median; a ratio that is closer to 1 than
this says nothing.\
"""

HARMLESS_LEGEND = """\
Each cell: patched / stock, medians. downtime: from the event that the source
begins to save its devices to the one that the destination has all. load: how
long the destination reads the file. silent: the longest that the monitor took
for an answer, asked every 5 ms. Targets: the median of the ratios of runs in
turns, and its confidence interval by order statistics; missed if all of the
interval is above the target, undecided if only the median is.\
"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    def count(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f'{text} is not 1 or more')
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.split('\n\n', 1)[0])
    add_qemu_arguments(parser)
    parser.add_argument('--list', action='store_true',
                        help='print the rows, measure nothing')
    parser.add_argument('--only', metavar='PATTERN', action='append',
                        default=[],
                        help="only the rows whose name matches, e.g. "
                             "'multifd*', or one of the groups "
                             f"{' and '.join(GROUPS)} (can be repeated)")
    parser.add_argument('--runs', type=count, metavar='N',
                        help=f'of every variant (default {RUNS}); of rows '
                             'about speed, whose differences are small, twice '
                             'as many and one')
    parser.add_argument('--size', type=guest_size,
                        help='RAM of idle guests (default 8G); less is taken '
                             'if memory is short')
    parser.add_argument('--full-size', type=guest_size,
                        help='RAM of guests with data (default 4G); likewise')
    parser.add_argument('--quick', action='store_true',
                        help='small guests, one run: to try it out')
    parser.add_argument('--check', action='store_true',
                        help='fail if a target is missed')
    parser.add_argument('--save', action='store_true',
                        help='write the tables to a file in docs/results, too')
    parser.add_argument('--directory', metavar='DIR', default=OUTPUT,
                        help='for temporary files as large as a guest, and '
                             'for bench.json, with --quick or --only '
                             'bench-partial.json (default build/bench)')
    args = parser.parse_args()
    sizes = QUICK_SIZE if args.quick else SIZE
    args.size = args.size or sizes[IDLE]
    args.full_size = args.full_size or sizes[FULL]
    once = args.quick and not args.runs
    args.runs = args.runs or (1 if args.quick else RUNS)
    args.speed_runs = 1 if once else 2 * args.runs + 1
    args.json = os.path.join(args.directory, (
        'bench-partial.json' if args.quick or args.only else 'bench.json'))
    return args


# What the machine can bear

def busy_cpus(seconds: float) -> float:
    """How many processors are in use by others; looks for so long."""
    def idle_and_all() -> List[int]:
        with open('/proc/stat', encoding='ascii') as file:
            # user nice system idle iowait irq softirq steal, see proc(5)
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return [ticks[3] + ticks[4], sum(ticks)]

    before = idle_and_all()
    time.sleep(seconds)
    idle, everything = (after - start for after, start in zip(idle_and_all(), before))
    cpus = os.cpu_count() or 1
    return cpus * (1 - idle / everything) if everything else 0.0


def file_system(directory: str) -> str:
    """The type of the file system that a directory is on: 'ext4', ..."""
    device = os.stat(directory).st_dev
    wanted = f'{os.major(device)}:{os.minor(device)}'
    kind = 'unknown'
    with open('/proc/self/mountinfo', encoding='utf-8') as lines:
        for line in lines:
            before, _, after = line.partition(' - ')
            if before.split()[2] == wanted:
                kind = after.split()[0]
    return kind


@dataclass(frozen=True)
class Limits:
    """What two guests and a file may take at the moment, in bytes."""
    memory: int
    disk: int
    huge_pages: int
    shm: int
    disk_is_memory: bool

    @classmethod
    def now(cls, directory: str, floor: int) -> 'Limits':
        """floor: bytes of memory to be left alone"""
        return cls(memory=memory.available() - floor,
                   disk=shutil.disk_usage(directory).free - floor,
                   huge_pages=host.free_huge_pages() * HUGE_PAGE,
                   shm=host.free_shm(),
                   disk_is_memory=file_system(directory) in ('tmpfs',
                                                             'ramfs'))

    def shortage(self, row: Row, size: int) -> Optional[str]:
        """What is too little for both guests to fill up and every page to go
        to the file; a sentence's beginning, or None if all is well.
        """
        backends = {backend for variant in row.variants for backend in variant.backends}
        on_disk = row.operation.file_size(size)
        if 'other-file' in backends:
            on_disk += 2 * size
        in_memory = 2 * size + (on_disk if self.disk_is_memory else 0)
        if 'hugetlb' in backends:
            if 2 * size > self.huge_pages:
                return f'{_mib(self.huge_pages)} of huge pages are free'
            in_memory -= 2 * size
        if backends & {'shm-directory', 'reserved'} and 2 * size > self.shm:
            return f'{_mib(self.shm)} are free in {SHM}'
        if in_memory > self.memory:
            return f'{_mib(self.memory)} of memory can be spared'
        if on_disk > self.disk:
            return f'{_mib(self.disk)} of disk can be spared'
        return None


def _mib(size: int) -> str:
    return f'{max(0, size) // MIB} MiB'


def why_not(row: Row, limits: Limits, direct_io: bool) -> Optional[str]:
    """Why a row cannot be measured here, as part of a sentence, or None."""
    if row.needs_direct_io and not direct_io:
        return 'the file system has no O_DIRECT'
    if row.needs_thp and host.shmem_unit() == PAGE_SIZE:
        return ("memfds have no huge pages: 'echo advise > "
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled' gives "
                'them some')
    for variant in row.variants:
        why = variant.size and memory.check_mappable(variant.size)
        if why:
            return (f'a memfd of {memory.format_size(variant.size or 0)} '
                    f'cannot be mapped: {why}')
    shortage = limits.shortage(row, SMALLEST)
    if shortage and shortage.endswith('huge pages are free'):
        pages = 2 * (row.largest or SMALLEST) // HUGE_PAGE
        return f"{shortage}: 'sysctl vm.nr_hugepages={pages}' gives it enough"
    return shortage and f'only {shortage}'


# Measuring

class Bench:
    """A run of the benchmark."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rows = select(ALL, args.only)
        if args.quick:
            self.rows = [shrunk(row) for row in self.rows]
        self.floor = memory_floor()
        self.accel = args.accel or pick_accelerator()
        self.results: List[RowResult] = []
        self.versions: Dict[str, str] = {}
        self.direct_io = host.direct_io_works(args.directory)
        self.environment: Dict[str, Any] = {
            **report.machine(), 'accel': self.accel,
            'file_system': file_system(args.directory),
            'busy_cpus': busy_cpus(1.0),
            'memory_available': memory.available()}

    @property
    def is_busy(self) -> bool:
        """Whether others used the machine when this began."""
        return self.environment['busy_cpus'] > 0.2

    def run(self) -> None:
        """Measure all rows."""
        if self.is_busy:
            say(f'The machine is busy ({self.environment["busy_cpus"]:.1f} '
                'CPUs in use): times will be off.')
        for number, row in enumerate(self.rows, 1):
            say(f'[{number}/{len(self.rows)}] {row.name}: {row.what}')
            self.results.append(self.measure_row(row))
            for note in summary.notes(self.results[-1:]):
                say(f'  {note}')
            self.write_json()

    def measure_row(self, row: Row) -> RowResult:
        """Measure both variants in turns."""
        wanted = (self.args.size if row.guest == IDLE else self.args.full_size)
        limits = Limits.now(self.args.directory, self.floor)
        size = memory.halve_until(min(wanted, row.largest or wanted),
                                  lambda size: not limits.shortage(row, size))
        result = RowResult(row, size, wanted,
                           skipped=why_not(row, limits, self.direct_io))
        if not result.skipped:
            runs = (self.args.speed_runs
                    if row in SPEED + SCATTERED + HARMLESS
                    else self.args.runs)
            for number in range(runs):
                self.measure_both(result, number)
        return result

    def measure_both(self, result: RowResult, number: int) -> None:
        """Run number of both variants, in alternating order."""
        for variant in result.row.variants[::-1 if number % 2 else 1]:
            # What failed once would most likely fail again
            if variant.label in result.failures:
                continue
            try:
                measured = self.measure_once(result, variant, number == 0)
            except (MigrationFailed, GuestError, OSError) as err:
                result.failures[variant.label] = str(err)
                continue
            result.runs.setdefault(variant.label, []).append(measured)
            self.versions[variant.qemu] = measured.version
            say(f'  {variant.label} {number + 1}: '
                f'{measured.times.total:.3f} s, '
                f'source {measured.source.ram / MIB:+.1f} MiB')
            if measured.differing_pages:
                result.failures[variant.label] = (
                    f'{measured.differing_pages} pages of the two guests\' '
                    'RAM differ')

    def measure_once(self, result: RowResult, variant: Variant,
                     verify: bool) -> Measurement:
        """One run of one variant."""
        return measure(result.row.operation, MeasureConfig(
            binary=getattr(self.args, variant.qemu),
            size=result.size_of(variant),
            directory=self.args.directory, backend=variant.backend,
            destination=variant.destination,
            fill=None if variant.scattered else result.row.fill,
            scatter=result.size if variant.scattered else None,
            capabilities=variant.capabilities,
            accel=self.accel, verify=verify,
            extra_args=tuple(self.args.qemu_args),
            memory_floor=self.floor))

    def write_json(self) -> None:
        """Replace the file by all that is known so far."""
        data = {'machine': self.environment,
                'qemu': {name: {'path': getattr(self.args, name),
                                'version': version}
                         for name, version in self.versions.items()},
                'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
                'runs': self.args.runs, 'speed_runs': self.args.speed_runs,
                'complete': len(self.results) == len(self.rows),
                'rows': [summary.as_dict(each) for each in self.results]}
        write_replacing(self.args.json, data)

    @property
    def failed(self) -> bool:
        """Whether something could not be measured, or RAM differs."""
        return any(result.failures for result in self.results)


def write_replacing(path: str, data: Any) -> None:
    """Write JSON; whoever reads the file sees the old or the new one."""
    partial = f'{path}.part'
    try:
        with open(partial, 'w', encoding='utf-8') as file:
            json.dump(data, file, indent=1)
            file.write('\n')
        os.replace(partial, path)
    except OSError as err:
        raise UserError(f'cannot write {path}: {err.strerror}') from err
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


# Text

def headline(bench: Bench) -> str:
    """Of what and where the figures are."""
    versions = ', '.join(f'{name} QEMU {version}'
                         for name, version in sorted(bench.versions.items()))
    environment = bench.environment
    text = (f'{report.origin()} {versions}; {bench.accel}, files on '
            f'{environment["file_system"]}, shmem huge pages: '
            f'{environment["shmem_thp"]}.')
    if bench.args.quick:
        text += ' Small guests and one run (--quick): these are no figures.'
    if bench.is_busy:
        text += (' The machine was busy when this began '
                 f'({environment["busy_cpus"]:.1f} CPUs in use): the times '
                 'are not to be trusted.')
    return textwrap.fill(text, 79, break_on_hyphens=False)


def print_report(bench: Bench) -> List[summary.Verdict]:
    """The tables; returns the verdicts."""
    measured = [result for result in bench.results if result.runs]
    harmless = [result for result in measured if result.row in HARMLESS]
    speed = [result for result in measured if result.row in SPEED + SCATTERED]
    growth = [result for result in measured if result not in harmless + speed]
    verdicts = [verdict for result in measured for verdict in summary.judge(result)]
    parts = [headline(bench)] if bench.versions else []
    if growth:
        parts += ['Growth of an idle guest:', summary.growth_table(growth)]
    if speed:
        parts += ['Time of precopy over tcp:', summary.speed_table(speed)]
    if harmless:
        parts += ['Guests that have nothing to gain:', summary.harmless_table(harmless)]
    if verdicts:
        parts += ['Targets:', summary.targets_table(verdicts)]
    if growth or speed:
        parts += [LEGEND]
    if harmless:
        parts += [HARMLESS_LEGEND]
    parts += ['\n'.join(textwrap.fill(note, 79, initial_indent='- ',
                                      subsequent_indent='  ')
                        for note in summary.notes(bench.results))]
    text = '\n\n'.join(part for part in parts if part)
    print(text)
    if bench.args.save:
        save(text, bench.args.only)
    return verdicts


def save(text: str, patterns: Sequence[str]) -> None:
    """Write the report to a file that is named after what was selected."""
    words = re.findall(r'[\w-]+', ' '.join(['bench', *patterns]))
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, f"{'-'.join(words)}.rst")
    with open(path, 'w', encoding='utf-8') as file:
        file.write(f'.. {report.LICENCE}\n\n{text}\n')
    say(f'The tables are in {os.path.relpath(path)}.')


def list_rows(rows: Sequence[Row]) -> None:
    """For --list."""
    print(report.rst_table(('row', 'what', 'compares'), [
        (row.name, row.what,
         ' with '.join(variant.label for variant in row.variants[::-1]))
        for row in rows]))


def run(args: argparse.Namespace) -> int:
    """All of it; returns the exit status."""
    if not select(ALL, args.only):
        raise UserError(f"no row matches {' or '.join(args.only)}: see --list")
    if args.list:
        list_rows(select(ALL, args.only))
        return 0
    ready(args)
    try:
        os.makedirs(args.directory, exist_ok=True)
    except OSError as err:
        raise UserError(f'cannot make {args.directory}: {err.strerror}') from err

    if not os.access(args.directory, os.W_OK | os.X_OK):
        raise UserError(f'cannot write to {args.directory}')

    bench = Bench(args)
    bench.run()
    verdicts = print_report(bench)
    say(f'All values are in {os.path.relpath(args.json)}.')
    missed = any(verdict.met is False for verdict in verdicts)
    return int(bench.failed or (args.check and missed))


if __name__ == '__main__':
    sys.exit(run_main('bench', lambda: run(parse_args())))
