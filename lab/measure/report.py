# SPDX-License-Identifier: GPL-2.0-or-later
"""Results as text: simple tables of reStructuredText, and where they come from."""

import os
import platform
import subprocess
import textwrap
import time
from typing import Any, Dict, List, Optional, Sequence

from lab import memory
from lab.base import ROOT
from lab.memory import MIB, format_size
from lab.measure.once import Pressure, Result


# Of what is made
LICENCE = 'SPDX-License-Identifier: GPL-2.0-or-later'


def rst_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A simple table; no cell may be empty, in the first column least of all
    (there it would continue the row above).
    """
    widths = [max(len(row[column]) for row in (header, *rows))
              for column in range(len(header))]
    border = '  '.join('=' * width for width in widths)

    def line(row: Sequence[str]) -> str:
        return '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

    return '\n'.join([border, line(header), border,
                      *(line(row) for row in rows), border])


def mib(size: Optional[int]) -> str:
    """Whole MiB, or 'none' for what there is not."""
    return 'none' if size is None else str(round(size / MIB))


def _rows(name: str, result: Result) -> List[List[str]]:
    sides = (('source', result.source_before, result.source_after),
             ('destination', result.destination_before,
              result.destination_after))
    return [[name, format_size(result.config.size), f'{side}, memfd',
             f'{mib(before.allocated)} -> {mib(after.allocated)}',
             f'{mib(before.rss)} -> {mib(after.rss)}',
             f'{result.times.total:.1f}',
             'yes' if result.comparison.identical else 'NO']
            for side, before, after in sides]


def results_table(results: Dict[str, Result]) -> str:
    """Two rows for each result; they are known by the name of the QEMU."""
    header = ('QEMU', 'guest RAM', 'process', 'allocated, MiB', 'RSS, MiB',
              'total time, s', 'RAM identical')
    return rst_table(header, [row for name, result in results.items()
                              for row in _rows(name, result)])


def in_words(results: Dict[str, Result]) -> str:
    """What the table says, as a paragraph."""
    return textwrap.fill(' '.join(_sentence(name, result) for name, result
                                  in results.items()), 79)


def _sentence(name: str, result: Result) -> str:
    build, _, capability = name.partition(', ')
    given = f' and the capability {capability}' if capability else ''
    return (f'With {build} QEMU {result.version.split()[0]}{given}, a guest of '
            f'{format_size(result.config.size)} that had '
            f'{mib(result.source_holds)} MiB of data made its source grow by '
            f'{mib(result.source_growth)} MiB and its destination grow by '
            f'{mib(result.destination_growth)} MiB, in '
            f'{result.times.total:.1f} seconds.')


def pressure_table(pressures: Dict[str, Pressure]) -> str:
    """One row for each; they are known by the name of the QEMU."""
    header = ('QEMU', 'guest RAM', 'limit, MiB', 'highest, MiB',
              'destination', 'RAM identical')
    rows = []
    for name, pressure in pressures.items():
        result = pressure.result
        identical = result and result.comparison.identical
        rows.append([name, format_size(pressure.config.size),
                     mib(pressure.limit), mib(pressure.peak),
                     'has all' if result else 'killed by the kernel',
                     'n/a' if not result else 'yes' if identical else 'NO'])
    return rst_table(header, rows)


def processor() -> str:
    """What the processor calls itself."""
    with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as lines:
        for line in lines:
            name, _, value = line.partition(':')
            if name.strip() == 'model name':
                return value.strip()
    return platform.machine()


def commit() -> str:
    """This project's commit, short, with "-dirty" if files are changed."""
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--exclude=*'],
            cwd=ROOT, check=True, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


def origin() -> str:
    """Where and when figures come from, for their head; a sentence."""
    return (f'{processor()}, {len(os.sched_getaffinity(0))} CPUs, '
            f'{memory.total() / memory.GIB:.0f} GiB of memory, Linux '
            f'{platform.release()}; commit {commit()}, '
            f'{time.strftime("%Y-%m-%d", time.gmtime())}.')


def machine() -> Dict[str, Any]:
    """What the measurements depend on, apart from QEMU."""
    def read(path: str) -> Optional[str]:
        try:
            with open(path, encoding='ascii') as file:
                return file.read().strip()
        except OSError:
            return None

    def chosen(path: str) -> Optional[str]:
        """The one in brackets."""
        words = (read(path) or '').split()
        return next((word[1:-1] for word in words if word[0] == '['), None)

    return {'kernel': platform.release(),
            'architecture': platform.machine(),
            'processor': processor(),
            'cpus': len(os.sched_getaffinity(0)),
            'memory_total': memory.total(),
            'page_size': memory.PAGE_SIZE,
            'overcommit_memory': read('/proc/sys/vm/overcommit_memory'),
            'thp': chosen('/sys/kernel/mm/transparent_hugepage/enabled'),
            'shmem_thp': chosen(
                '/sys/kernel/mm/transparent_hugepage/shmem_enabled')}
