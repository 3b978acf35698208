# SPDX-License-Identifier: GPL-2.0-or-later
"""Results as text: a simple table of reStructuredText, and JSON."""

import json
import os
import platform
import subprocess
import textwrap
import time
from dataclasses import asdict
from typing import Any, Dict, List, Optional, Sequence

from lab import memory
from lab.base import ROOT
from lab.memory import MIB, format_size
from lab.measure.once import Pressure, Result


def rst_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A simple table; no cell may be empty, in the first column least of all
    (there it would continue the row above).
    """
    widths = [max(len(row[column]) for row in (header, *rows))
              for column in range(len(header))]
    border = '  '.join('=' * width for width in widths)

    def line(row: Sequence[str]) -> str:
        return '  '.join(cell.ljust(width)
                         for cell, width in zip(row, widths)).rstrip()

    return '\n'.join([border, line(header), border,
                      *(line(row) for row in rows), border])


def mib(size: Optional[int]) -> str:
    """Whole MiB, or 'none' for what there is not."""
    return 'none' if size is None else str(round(size / MIB))


def _change(before: Optional[int], after: Optional[int]) -> str:
    if before is None and after is None:
        return 'no file'
    return f'{mib(before)} -> {mib(after)}'


def _rows(name: str, result: Result) -> List[List[str]]:
    sides = (('source', result.config.source_backend,
              result.source_before, result.source_after),
             ('destination', result.config.destination_backend,
              result.destination_before, result.destination_after))
    return [[name, format_size(result.config.size), f'{side}, {backend}',
             _change(before.allocated, after.allocated),
             _change(before.rss, after.rss),
             f'{result.times.total:.1f}',
             'yes' if result.comparison.identical else 'NO']
            for side, backend, before, after in sides]


def results_table(results: Dict[str, List[Result]]) -> str:
    """Two rows for each result; results of one QEMU are known by its name."""
    header = ('QEMU', 'guest RAM', 'process', 'allocated, MiB', 'RSS, MiB',
              'total time, s', 'RAM identical')
    return rst_table(header, [row for name, runs in results.items()
                              for result in runs
                              for row in _rows(name, result)])


def in_words(results: Dict[str, List[Result]], more: str = '') -> str:
    """What the table says, as a paragraph; more: text of another one."""
    text = ' '.join(_sentence(name, result)
                    for name, runs in results.items() for result in runs)
    return '\n\n'.join(textwrap.fill(paragraph, 79)
                       for paragraph in (text, more) if paragraph)


def _sentence(name: str, result: Result) -> str:
    growth = result.destination_growth
    if growth is None:
        raise ValueError('the destination has no file')
    version = result.destination_version.split()[0]
    build, _, capability = name.partition(', ')
    given = f' and the capability {capability}' if capability else ''
    source = ''
    if result.source_growth is not None:
        source = f'its source grow by {mib(result.source_growth)} MiB and '
    return (f'With {build} QEMU {version}{given}, a guest of '
            f'{format_size(result.config.size)} that had '
            f'{mib(result.source_holds)} MiB of data made {source}'
            f'its destination grow by {mib(growth)} MiB, in '
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


def result_as_dict(result: Result) -> Dict[str, Any]:
    """For JSON: all fields, and what follows from them.  Sizes in bytes."""
    return {**asdict(result),
            'source_growth': result.source_growth,
            'destination_growth': result.destination_growth,
            'destination_bound': result.destination_bound,
            'destination_is_sparse': result.destination_is_sparse,
            'ram_identical': result.comparison.identical}


def write_json(path: str, results: Dict[str, List[Result]],
               **more: Any) -> None:
    """Write all the numbers to a file."""
    with open(path, 'w', encoding='utf-8') as file:
        json.dump({'machine': machine(), **more,
                   'runs': {name: [result_as_dict(result) for result in runs]
                            for name, runs in results.items()}},
                  file, indent=2)
        file.write('\n')
