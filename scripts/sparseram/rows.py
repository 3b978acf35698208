# SPDX-License-Identifier: GPL-2.0-or-later
"""What the benchmark measures: its rows, and what each of them shall reach."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import List, Optional, Sequence, Tuple

from .memory import GIB, MIB, format_size
from .operation import (DirtyRate, Dump, InternalSnapshot, Operation, OverTcp,
                        ToFile)


@dataclass(frozen=True)
class Variant:
    """One of the two things that a row compares.

    qemu: 'stock' or 'patched'; backend: one of guest.BACKENDS.
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
class HolesAreRight:
    """A target: query-migrate tells as many holes as there were."""


# Which size of guest RAM a row takes from the command line
IDLE = 'idle'
FULL = 'full'


@dataclass(frozen=True)
class Row:
    """Two variants of one operation, to be measured in turns.

    what: in words, for people.
    guest: IDLE or FULL.  fill: as in MeasureConfig.
    largest: bytes of RAM at most, whatever was asked for; why: the reason.
    needs_direct_io: of the file system that the files are on.
    """
    name: str
    what: str
    operation: Operation
    baseline: Variant
    subject: Variant
    guest: str = IDLE
    fill: Optional[int] = None
    largest: Optional[int] = None
    why: str = ''
    needs_direct_io: bool = False
    targets: Tuple[object, ...] = ()

    @property
    def variants(self) -> Tuple[Variant, Variant]:
        """Both of them, the baseline first."""
        return self.baseline, self.subject


def stock_and_patched(backend: str) -> Tuple[Variant, Variant]:
    """The usual two variants, with one backend."""
    return (Variant('stock', 'stock', backend),
            Variant('patched', 'patched', backend))


SOURCE_STAYS = AtMost('source_growth', 16 * MIB)
DESTINATION_STAYS = AtMost('destination_growth', 16 * MIB)
SOURCE_TABLES = AtMost('source_page_tables', 1 * MIB, strict=True)
DESTINATION_TABLES = AtMost('destination_page_tables', 1 * MIB, strict=True)

# Of what only reads RAM; of what also sends it; of what also loads it
_READS = (SOURCE_STAYS, SOURCE_TABLES)
_MIGRATES = (*_READS, DESTINATION_TABLES, HolesAreRight())
_LOADS = (*_MIGRATES, DESTINATION_STAYS)


def _growth(name: str, what: str, operation: Operation,
            targets: Sequence[object], backend: str = 'memfd',
            largest: Optional[int] = None, why: str = '',
            needs_direct_io: bool = False) -> Row:
    baseline, subject = stock_and_patched(backend)
    return Row(name, what, operation, baseline, subject, largest=largest,
               why=why, needs_direct_io=needs_direct_io,
               targets=tuple(targets))


_MAPPED_RAM = ('mapped-ram',)
_MAPPED_RAM_MULTIFD = ('mapped-ram', 'multifd')

# Of an idle guest
GROWTH: Tuple[Row, ...] = (
    _growth('precopy', 'precopy over tcp', OverTcp(), _LOADS),
    _growth('xbzrle', 'precopy over tcp, xbzrle', OverTcp(('xbzrle',)),
            _LOADS),
    _growth('multifd', 'multifd, zero-page-detection=multifd',
            OverTcp(('multifd',), {'zero-page-detection': 'multifd'}),
            _LOADS),
    _growth('multifd-legacy', 'multifd, zero-page-detection=legacy',
            OverTcp(('multifd',), {'zero-page-detection': 'legacy'}),
            _LOADS),
    # Every page is sent as data, so that the destination has to fill up
    _growth('multifd-none', 'multifd, zero-page-detection=none',
            OverTcp(('multifd',), {'zero-page-detection': 'none'}), _READS),
    _growth('postcopy', 'postcopy at once',
            OverTcp(('postcopy-ram',), postcopy=True), _LOADS),
    _growth('postcopy-preempt', 'postcopy at once, postcopy-preempt',
            OverTcp(('postcopy-ram', 'postcopy-preempt'), postcopy=True),
            _LOADS),
    _growth('file', 'to a file', ToFile(), _LOADS),
    _growth('mapped-ram', 'to a file, mapped-ram', ToFile(_MAPPED_RAM),
            _LOADS),
    _growth('mapped-ram-multifd', 'to a file, mapped-ram, multifd',
            ToFile(_MAPPED_RAM_MULTIFD), _LOADS),
    _growth('mapped-ram-direct-io',
            'to a file, mapped-ram, multifd, direct-io',
            ToFile(_MAPPED_RAM_MULTIFD, parameters={'direct-io': True}),
            _LOADS, needs_direct_io=True),
    _growth('background-snapshot', 'to a file, background-snapshot',
            ToFile(saving=('background-snapshot',)), _MIGRATES),
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
            OverTcp(), _LOADS, 'memfd-hugetlb', largest=2 * GIB,
            why='huge pages are few'),
    # The source of a private mapping is read, and so fills the file
    _growth('private', 'precopy over tcp, memfd share=off', OverTcp(),
            (DESTINATION_STAYS, DESTINATION_TABLES), 'memfd-private'),
    _growth('shm-file', 'precopy over tcp, memory-backend-file on /dev/shm',
            OverTcp(), _LOADS, 'shm-file'),
    _growth('anonymous', 'precopy over tcp, memory-backend-ram', OverTcp(),
            (), 'anonymous'),
    _growth('anonymous-multifd', 'multifd, memory-backend-ram',
            OverTcp(('multifd',)),
            (SOURCE_STAYS, DESTINATION_STAYS, DESTINATION_TABLES),
            'anonymous'))


def _speed(name: str, what: str, variants: Tuple[Variant, Variant],
           limit: float, guest: str = FULL, fill: Optional[int] = None,
           holes: bool = False, operation: OverTcp = OverTcp()) -> Row:
    baseline, subject = variants
    targets: Tuple[object, ...] = (RatioAtMost('total_time', limit),)
    if holes:
        targets += (HolesAreRight(),)
    return Row(name, what, operation, baseline, subject, guest, fill,
               targets=targets)


# Precopy over tcp, unless something else is said
SPEED: Tuple[Row, ...] = (
    _speed('speed-full', 'full of data', stock_and_patched('memfd'), 1.02,
           fill=1, holes=True),
    _speed('speed-multifd-full', 'multifd, full of data',
           stock_and_patched('memfd'), 1.02, fill=1,
           operation=OverTcp(('multifd',))),
    _speed('speed-alternate', 'data in every second page',
           stock_and_patched('memfd'), 1.0, fill=2, holes=True),
    _speed('speed-anonymous-idle', 'memory-backend-ram, idle',
           stock_and_patched('anonymous'), 1.02, IDLE),
    _speed('speed-anonymous-full', 'memory-backend-ram, full of data',
           stock_and_patched('anonymous'), 1.02, fill=1),
    _speed('speed-memfd', 'idle memfd over idle memory-backend-ram',
           (Variant('anonymous', 'patched', 'anonymous'),
            Variant('memfd', 'patched', 'memfd')), 1.0, IDLE))


# With the capability sparse-ram
_SPARSE_RAM = ('sparse-ram',)
_LEAN = AtMost('source_rss_peak', 64 * MIB), AtMost('destination_rss_peak',
                                                    64 * MIB)


def _with_sparse_ram(size: int) -> Variant:
    return Variant(f'sparse-ram, {format_size(size)}', 'patched',
                   capabilities=_SPARSE_RAM, size=size)


def _sparse_ram(name: str, baseline: Variant, size: int,
                seconds: float) -> Row:
    return Row(name, f'precopy over tcp, sparse-ram, {format_size(size)}',
               OverTcp(), baseline, _with_sparse_ram(size),
               targets=(AtMost('total_time', seconds), *_LOADS, *_LEAN))


# The sizes do not depend on the memory that there is: nothing fills up
SPARSE_RAM: Tuple[Row, ...] = (
    _sparse_ram('sparse-ram', Variant('stock', 'stock'), 8 * GIB, 0.030),
    _sparse_ram('sparse-ram-256G', _with_sparse_ram(8 * GIB), 256 * GIB, 0.5),
    _sparse_ram('sparse-ram-1T', _with_sparse_ram(8 * GIB), 1024 * GIB, 1.0))

# Time depends on the data, not on the size of RAM
SCATTERED: Tuple[Row, ...] = (
    Row('sparse-ram-scattered',
        'sparse-ram, data in extents of 64 KiB over 256 GiB', OverTcp(),
        Variant('full', 'patched', capabilities=_SPARSE_RAM),
        Variant('scattered', 'patched', capabilities=_SPARSE_RAM,
                size=256 * GIB, scattered=True),
        FULL, fill=1, largest=2 * GIB, why='this much data is enough',
        targets=(RatioAtMost('total_time', 1.10), HolesAreRight())),)

ALL: Tuple[Row, ...] = GROWTH + SPARSE_RAM + SPEED + SCATTERED


def select(rows: Sequence[Row], patterns: Sequence[str]) -> List[Row]:
    """The rows whose name matches any pattern; all if there is none.

    A pattern is as the shell's for files.
    """
    return [row for row in rows
            if not patterns or any(fnmatchcase(row.name, pattern)
                                   for pattern in patterns)]
