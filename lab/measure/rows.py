# SPDX-License-Identifier: GPL-2.0-or-later
"""What the benchmark measures: its rows, and what each of them shall reach."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, List, Optional, Sequence, Tuple

from lab.measure.operation import (DirtyRate, Dump, InternalSnapshot, Migrate,
                                   Operation)
from lab.memory import GIB, MIB, SMALLEST, format_size
from lab.modes import MODES, MULTIFD


@dataclass(frozen=True)
class Variant:
    """One of the two things that a row compares.

    qemu: 'stock' or 'patched'; backend: one of lab.ram.KINDS; destination:
    likewise, if that has another one.
    capabilities: on top of those of the row's operation.
    size: bytes of RAM, if not that of the row.  No more of it than the row's
    size is expected to fill up; with scattered, that much of it has data.
    """
    label: str
    qemu: str
    backend: str = 'memfd'
    capabilities: Tuple[str, ...] = ()
    size: Optional[int] = None
    scattered: bool = False
    destination: Optional[str] = None

    @property
    def backends(self) -> Tuple[str, str]:
        """Of the source and of the destination."""
        return self.backend, self.destination or self.backend


@dataclass(frozen=True)
class AtMost:
    """A target: the median of a metric of the subject has this limit.

    In bytes, or in seconds if the metric is a time.

    strict: the limit itself is too much already.
    metric, and what follows, as in summary.METRICS.
    """
    metric: str
    limit: float
    strict: bool = False


@dataclass(frozen=True)
class RatioAtMost:
    """A target: the subject's median over the baseline's."""
    metric: str
    limit: float


@dataclass(frozen=True)
class PairedRatioAtMost:
    """A target: the median of the ratios of runs that followed each other.

    Missed only if the confidence interval of that median lies above the limit.
    """
    metric: str
    limit: float


@dataclass(frozen=True)
class HolesAreRight:
    """A target: query-migrate tells as many holes as there were."""


# Which size of guest RAM a row takes from the command line
IDLE = 'idle'
FULL = 'full'


@dataclass(frozen=True)
class Row:
    """Two variants of one operation, to be measured in turns.

    baseline: None if there is nothing to compare with.
    what: in words, for people.
    guest: IDLE or FULL.  fill: as in MeasureConfig.
    largest: bytes of RAM at most, whatever was asked for; why: the reason.
    needs_direct_io: of the file system that the files are on.
    needs_thp: huge pages in memfds.
    """
    name: str
    what: str
    operation: Operation
    baseline: Optional[Variant]
    subject: Variant
    guest: str = IDLE
    fill: Optional[int] = None
    largest: Optional[int] = None
    why: str = ''
    needs_direct_io: bool = False
    needs_thp: bool = False
    targets: Tuple[object, ...] = ()

    @property
    def variants(self) -> Tuple[Variant, ...]:
        """Those that there are, the baseline first."""
        return ((self.baseline, self.subject) if self.baseline else (self.subject,))


def stock_and_patched(backend: str, destination: Optional[str] = None) \
        -> Tuple[Variant, Variant]:
    """The usual two variants; destination: its backend, if another one."""
    return (Variant('stock', 'stock', backend, destination=destination),
            Variant('patched', 'patched', backend, destination=destination))


SOURCE_STAYS = AtMost('source_growth', 16 * MIB)
DESTINATION_STAYS = AtMost('destination_growth', 16 * MIB)
SOURCE_TABLES = AtMost('source_page_tables', 1 * MIB, strict=True)
DESTINATION_TABLES = AtMost('destination_page_tables', 1 * MIB, strict=True)

# Of what only reads RAM; of what also sends it; of what also loads it
_READS = (SOURCE_STAYS, SOURCE_TABLES)
_MIGRATES = (*_READS, DESTINATION_TABLES, HolesAreRight())
_LOADS = (*_MIGRATES, DESTINATION_STAYS)


def _growth(name: str, what: str, operation: Operation,
            targets: Sequence[object], backend: str = 'memfd', **more: Any) -> Row:
    return Row(name, what, operation, *stock_and_patched(backend),
               targets=tuple(targets), **more)


# Of an idle guest
GROWTH: Tuple[Row, ...] = (
    _growth('precopy', 'precopy over tcp', Migrate(), _LOADS),
    _growth('xbzrle', 'precopy over tcp, xbzrle', Migrate(MODES['xbzrle']),
            _LOADS),
    _growth('multifd', 'multifd, zero-page-detection=multifd',
            Migrate(MULTIFD.also(zero_page_detection='multifd')),
            _LOADS),
    _growth('multifd-legacy', 'multifd, zero-page-detection=legacy',
            Migrate(MODES['multifd-legacy']),
            _LOADS),
    # Every page is sent as data, so that the destination has to fill up
    _growth('multifd-none', 'multifd, zero-page-detection=none',
            Migrate(MODES['multifd-no-zero-page-detection']), _READS),
    _growth('postcopy', 'postcopy at once',
            Migrate(MODES['postcopy']), _LOADS),
    _growth('postcopy-preempt', 'postcopy at once, postcopy-preempt',
            Migrate(MODES['preempt']),
            _LOADS),
    _growth('file', 'to a file', Migrate(MODES['file']), _LOADS),
    _growth('mapped-ram', 'to a file, mapped-ram', Migrate(MODES['mapped-ram']),
            _LOADS),
    _growth('mapped-ram-multifd', 'to a file, mapped-ram, multifd',
            Migrate(MODES['mapped-ram-multifd']), _LOADS),
    _growth('mapped-ram-direct-io',
            'to a file, mapped-ram, multifd, direct-io',
            Migrate(MODES['mapped-ram-multifd'].also(direct_io=True)),
            _LOADS, needs_direct_io=True),
    _growth('background-snapshot', 'to a file, background-snapshot',
            Migrate(MODES['background-snapshot']), _MIGRATES),
    # What savevm writes and loadvm reads is the guest's own RAM
    _growth('savevm', 'savevm and loadvm, qcow2', InternalSnapshot(), _READS),
    _growth('dump-elf', 'dump-guest-memory, raw ELF', Dump('elf'), _READS,
            largest=2 * GIB, why='raw ELF writes every zero to the disk'),
    _growth('dump-kdump-zlib', 'dump-guest-memory, kdump-zlib',
            Dump('kdump-zlib'), _READS),
    # With the default of 512 pages even reading them all makes little
    _growth('dirty-rate', 'calc-dirty-rate, page-sampling, 4096 pages a GiB',
            DirtyRate(4096), _READS),
    _growth('hugetlb', 'precopy over tcp, memfd of 2 MiB huge pages',
            Migrate(), _LOADS, 'hugetlb', largest=2 * GIB,
            why='huge pages are few'),
    # The source of a private mapping is read, and so fills the file
    _growth('private', 'precopy over tcp, memfd share=off', Migrate(),
            (DESTINATION_STAYS, DESTINATION_TABLES), 'memfd-private'),
    _growth('shm-file', 'precopy over tcp, memory-backend-file on /dev/shm',
            Migrate(), _LOADS, 'shm-directory'),
    _growth('anonymous', 'precopy over tcp, memory-backend-ram', Migrate(),
            (), 'anonymous'),
    _growth('anonymous-multifd', 'multifd, memory-backend-ram',
            Migrate(MULTIFD),
            (SOURCE_STAYS, DESTINATION_STAYS, DESTINATION_TABLES),
            'anonymous'))


# Precopy over tcp, unless something else is said
SPEED: Tuple[Row, ...] = (
    Row('speed-alternate', 'data in every second page', Migrate(),
        *stock_and_patched('memfd'), FULL, fill=2,
        targets=(RatioAtMost('total_time', 1.0), HolesAreRight())),
    Row('speed-memfd', 'idle memfd over idle memory-backend-ram', Migrate(),
        Variant('anonymous', 'patched', 'anonymous'),
        Variant('memfd', 'patched', 'memfd'),
        targets=(RatioAtMost('total_time', 1.0),)))


# With the capability sparse-ram
_SPARSE_RAM = ('sparse-ram',)
_LEAN = (AtMost('source_rss_peak', 64 * MIB), AtMost('destination_rss_peak', 64 * MIB))


def _with_sparse_ram(size: int) -> Variant:
    return Variant(f'sparse-ram, {format_size(size)}', 'patched',
                   capabilities=_SPARSE_RAM, size=size)


def _sparse_ram(name: str, baseline: Variant, size: int, seconds: float) -> Row:
    return Row(name, f'precopy over tcp, sparse-ram, {format_size(size)}',
               Migrate(), baseline, _with_sparse_ram(size),
               targets=(AtMost('total_time', seconds), *_LOADS, *_LEAN))


# The sizes do not depend on the memory that there is: nothing fills up
SPARSE_RAM: Tuple[Row, ...] = (
    _sparse_ram('sparse-ram', Variant('stock', 'stock'), 8 * GIB, 0.030),
    _sparse_ram('sparse-ram-256G', _with_sparse_ram(8 * GIB), 256 * GIB, 0.03),
    _sparse_ram('sparse-ram-1T', _with_sparse_ram(8 * GIB), 1024 * GIB,
                0.09))

# Time depends on the data, not on the size of RAM
SCATTERED: Tuple[Row, ...] = (
    Row('sparse-ram-scattered',
        'sparse-ram, data in extents of 64 KiB over 256 GiB', Migrate(),
        Variant('full', 'patched', capabilities=_SPARSE_RAM),
        Variant('scattered', 'patched', capabilities=_SPARSE_RAM,
                size=256 * GIB, scattered=True),
        FULL, fill=1, largest=2 * GIB, why='this much data is enough',
        targets=(RatioAtMost('total_time', 1.10), HolesAreRight())),)

# What the patches may cost a guest that gains nothing by them
_HARMLESS_LIMIT = 1.02

# Go on until all is sent.  By default, the last 300 ms of the first pass may
# be a part of the downtime, and how much it is depends on the moment.
_PRECOPY = Migrate(MODES['precopy'].also(downtime_limit=0))
_MULTIFD = Migrate(MULTIFD.also(downtime_limit=0))


def _paired(*metrics: str) -> Tuple[object, ...]:
    return tuple(PairedRatioAtMost(metric, _HARMLESS_LIMIT) for metric in metrics)


def _harmless(name: str, what: str, fill: Optional[int] = None,
              operation: Operation = _PRECOPY, backend: str = 'memfd',
              destination: Optional[str] = None, needs_thp: bool = False,
              targets: Tuple[object, ...] = _paired('cpu_time', 'downtime')) \
        -> Row:
    return Row(f'harmless-{name}', what, operation,
               *stock_and_patched(backend, destination), FULL, fill,
               largest=1 * GIB, why='which is enough for percents',
               needs_thp=needs_thp, targets=targets)


def _harmless_dirty(percent: int) -> Tuple[Row, ...]:
    return tuple(
        _harmless(f'{name}dirty-{percent}',
                  f'{what}full of data, {percent} % dirty at the switchover',
                  1, replace(operation, dirty=percent))
        for name, what, operation in (('', '', _PRECOPY),
                                      ('multifd-', 'multifd, ', _MULTIFD)))


def _harmless_restore(name: str, what: str, backend: str,
                      needs_thp: bool = False, fill: Optional[int] = None,
                      guest: str = 'an idle guest') -> Row:
    # Of anonymous RAM, with which both QEMUs write the same file
    return _harmless(f'restore-{name}',
                     f'mapped-ram file of {guest}, loaded into {what}', fill,
                     operation=Migrate(MODES['mapped-ram']), backend='anonymous',
                     destination=backend, needs_thp=needs_thp,
                     targets=_paired('destination_cpu', 'load_time'))


# Guests that gain little or nothing; precopy, unless something else is said.
# What all of them gain stands here for what it costs.
HARMLESS: Tuple[Row, ...] = (
    _harmless('full', 'full of data', 1),
    _harmless('multifd-full', 'multifd, full of data', 1, _MULTIFD),
    _harmless('alternate', 'data in every second page', 2),
    _harmless('multifd-alternate', 'multifd, data in every second page', 2,
              _MULTIFD),
    *_harmless_dirty(1), *_harmless_dirty(10), *_harmless_dirty(50),
    _harmless('thp-full', 'huge pages in the memfd, full of data', 1,
              needs_thp=True),
    _harmless('thp-alternate',
              'huge pages in the memfd, data in every second page', 2,
              needs_thp=True),
    _harmless('prealloc', 'memfd with prealloc=on, idle',
              backend='memfd-prealloc'),
    _harmless('prealloc-full', 'memfd with prealloc=on, full of data', 1,
              backend='memfd-prealloc'),
    _harmless('reserved-source', 'source reserved by fallocate(), idle',
              backend='reserved', destination='memfd'),
    _harmless('multifd-reserved-source',
              'multifd, source reserved by fallocate(), idle',
              operation=_MULTIFD, backend='reserved', destination='memfd'),
    _harmless('reserved-destination',
              'destination reserved by fallocate(), every second page', 2,
              destination='reserved'),
    _harmless('multifd-reserved-destination',
              'multifd, destination reserved by fallocate(), every second '
              'page', 2, _MULTIFD, destination='reserved'),
    _harmless('anonymous-idle', 'memory-backend-ram, idle',
              backend='anonymous'),
    _harmless('anonymous-full', 'memory-backend-ram, full of data', 1,
              backend='anonymous'),
    _harmless('private-idle', 'memfd share=off, idle',
              backend='memfd-private'),
    _harmless('private-full', 'memfd share=off, full of data', 1,
              backend='memfd-private'),
    _harmless('disk-idle', 'memory-backend-file not in memory, idle',
              backend='other-file'),
    _harmless('disk-full', 'memory-backend-file not in memory, full of data',
              1, backend='other-file'),
    _harmless('hugetlb-full', 'memfd of 2 MiB huge pages, full of data', 1,
              backend='hugetlb'),
    _harmless_restore('memfd', 'a memfd', 'memfd'),
    _harmless_restore('full', 'a memfd', 'memfd', fill=1,
                      guest='a guest full of data'),
    _harmless_restore('alternate', 'a memfd', 'memfd', fill=2,
                      guest='a guest with data in every second page'),
    _harmless_restore('thp', 'a memfd with huge pages', 'memfd', True),
    _harmless_restore('prealloc', 'a memfd with prealloc=on',
                      'memfd-prealloc'),
    _harmless_restore('reserved', 'a file reserved by fallocate()',
                      'reserved'),
    _harmless_restore('anonymous', 'memory-backend-ram', 'anonymous'),
    _harmless_restore('private', 'a memfd share=off', 'memfd-private'),
    _harmless_restore('disk', 'a file not in memory', 'other-file'),
    _harmless_restore('hugetlb', 'a memfd of 2 MiB huge pages',
                      'hugetlb'))


def _fast(name: str, what: str, size: int, seconds: float,
          operation: Operation = Migrate(), backend: str = 'memfd') -> Row:
    return Row(f'fast-{name}', f'{what}, {format_size(size)}', operation, None,
               Variant('patched', 'patched', backend, size=size),
               targets=(AtMost('total_time', seconds),))


# Idle guests, and how long they may take.  With the stock QEMU, all but the
# smallest would fill more memory than most machines have.
_FAST: Tuple[Row, ...] = (
    _fast('precopy-256G', 'precopy over tcp', 256 * GIB, 1.0),
    _fast('precopy-1T', 'precopy over tcp', 1024 * GIB, 4.0),
    _fast('multifd', 'multifd, 2 channels', 64 * GIB, 1.0,
          Migrate(MULTIFD.also(multifd_channels=2))),
    _fast('postcopy', 'postcopy at once', 64 * GIB, 0.5,
          Migrate(MODES['postcopy'])),
    _fast('background-snapshot', 'to a file, background-snapshot', 8 * GIB,
          0.3, Migrate(MODES['background-snapshot'])),
    _fast('hugetlb', 'precopy over tcp, memfd of 2 MiB huge pages', 8 * GIB,
          0.1, backend='hugetlb-unreserved'),
    _fast('dump-elf', 'dump-guest-memory, raw ELF', 4 * GIB, 0.2,
          Dump('elf')))

FAST: Tuple[Row, ...] = _FAST + SPARSE_RAM[1:]

ALL: Tuple[Row, ...] = (GROWTH + SPARSE_RAM + SPEED + SCATTERED + HARMLESS + _FAST)

GROUPS = {'harmless': HARMLESS, 'fast': FAST}


def select(rows: Sequence[Row], patterns: Sequence[str]) -> List[Row]:
    """The rows whose name matches any pattern; all if there is none.

    A pattern is as the shell's for files, or the name of one of GROUPS.
    """
    return [row for row in rows
            if not patterns or any(fnmatchcase(row.name, pattern)
                                   or row in GROUPS.get(pattern, ())
                                   for pattern in patterns)]


def shrunk(row: Row) -> Row:
    """The same for a guest of a 64th, if its size alone makes it slow."""
    if row not in _FAST:
        return row
    assert row.subject.size
    return replace(row, subject=replace(
        row.subject, size=max(SMALLEST, row.subject.size // 64)))
