# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel says about guest RAM.

Nothing here reads mapped guest RAM: a load from a mapped hole of a shared file
allocates a page, and the measurement would make what it measures.  pread()
returns zeroes for a hole and allocates nothing.

All sizes and offsets are in bytes, unless a name says otherwise.
"""

import errno
import mmap
import os
import random
import re
import resource
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import (Callable, Dict, Iterable, Iterator, List, Optional,
                    Protocol, Tuple)

from lab import UserError
from lab.cgroup import CgroupUnavailable, own_directories

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

PAGE_SIZE = os.sysconf('SC_PAGE_SIZE')

# Guests smaller than this show nothing
SMALLEST = 64 * MIB

# What one read() asks for when RAM is compared
_COMPARE_CHUNK = 1 * MIB

# st_blocks counts these, whatever the file's own block size is (stat(2))
_ST_BLOCK_SIZE = 512

Extent = Tuple[int, int]        # start, end (exclusive)


# The machine

def _read_fields(path: str) -> Dict[str, int]:
    """'Name:  123 kB' lines of a /proc file, as bytes."""
    fields = {}
    with open(path, encoding='ascii', errors='replace') as lines:
        for line in lines:
            match = re.match(r'(\S+):\s+(\d+) kB$', line)
            if match:
                fields[match[1]] = int(match[2]) * KIB
    return fields


# More than a machine can have: what version 1 of cgroups has for no limit
_NO_LIMIT = 1 << 60

# Of a cgroup: its limit, what it uses, and how memory.stat calls what it uses
# for files, which the kernel takes back before it refuses anything
_CGROUP_V1 = ('memory.limit_in_bytes', 'memory.usage_in_bytes',
              ('total_active_file', 'total_inactive_file'))
_CGROUP_V2 = ('memory.max', 'memory.current',
              ('active_file', 'inactive_file'))


def cgroup_headroom(directory: str, version_2: bool) -> Optional[int]:
    """What a cgroup still lets its processes allocate, None if no limit."""
    limit, usage, of_files = _CGROUP_V2 if version_2 else _CGROUP_V1

    def read(name: str) -> str:
        with open(f'{directory}/{name}', encoding='ascii') as file:
            return file.read()

    try:
        most = int(read(limit))
        if most >= _NO_LIMIT:
            return None
        statistics = dict(line.split() for line
                          in read('memory.stat').splitlines())
        cache = sum(int(statistics[name]) for name in of_files)
        return most - max(0, int(read(usage)) - cache)
    except (OSError, ValueError, KeyError):     # no such file, or "max"
        return None


@lru_cache(maxsize=None)
def _own_cgroups() -> Tuple[bool, List[str]]:
    try:
        return own_directories('memory')
    except CgroupUnavailable:
        return True, []


def available() -> int:
    """Memory that can be allocated now without swapping or an OOM kill."""
    free = _read_fields('/proc/meminfo')['MemAvailable']
    version_2, directories = _own_cgroups()
    for directory in directories:
        headroom = cgroup_headroom(directory, version_2)
        if headroom is not None:
            free = max(0, min(free, headroom))
    return free


def total() -> int:
    """All the memory of the machine."""
    return _read_fields('/proc/meminfo')['MemTotal']


def check_mappable(size: int) -> Optional[str]:
    """Try to create and map a memfd of this size, touching none of it.

    Returns None, or why it cannot be done.
    """
    fd = os.memfd_create('size-check')
    try:
        # Past RLIMIT_FSIZE, ftruncate() raises a signal before it fails
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and size > limit:
            return f'RLIMIT_FSIZE (ulimit -f) is {format_size(limit)}'
        os.ftruncate(fd, size)
        mmap.mmap(fd, size).close()
    except (OSError, OverflowError) as err:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            return f'{err} (RLIMIT_AS, ulimit -v, is {format_size(limit)})'
        if getattr(err, 'errno', None) == errno.ENOMEM:
            return f'{err} (see vm.overcommit_memory and ulimit -v)'
        return str(err)
    finally:
        os.close(fd)
    return None


def format_size(size: int) -> str:
    """64 MiB, 4 GiB: the largest unit that leaves no fraction."""
    for unit, name in ((GIB, 'GiB'), (MIB, 'MiB'), (KIB, 'KiB')):
        if size >= unit and size % unit == 0:
            return f'{size // unit} {name}'
    return f'{size} bytes'


def halve_until(wanted: int, fits: Callable[[int], object]) -> int:
    """wanted, or half of it, ... until it fits, but not below SMALLEST.

    The result may not fit then.
    """
    size = wanted
    while size // 2 >= SMALLEST and not fits(size):
        size //= 2
    return size


def parse_size(text: str) -> int:
    """'256G', '64M', '4GiB', as for QEMU's size=.  Raises ValueError."""
    match = re.fullmatch(r'(\d+)\s*([KMGT])(i?B)?', text, re.IGNORECASE)
    if not match:
        raise ValueError(f'{text!r} is not a size like 256G or 64M')
    return int(match[1]) << 10 * (1 + 'KMGT'.index(match[2].upper()))


# A process

@dataclass(frozen=True)
class Sample:
    """Memory of one guest at one moment.

    allocated: pages that guest RAM has: st_blocks of its file.  None if RAM
    is anonymous and so has no file.
    The rest is from /proc/PID/status and belongs to the whole process.
    rss_peak: the highest rss since the process started, or since
    reset_rss_peak().
    """
    allocated: Optional[int]
    rss: int
    rss_peak: int
    rss_anon: int
    rss_file: int
    rss_shmem: int
    page_tables: int


def sample(pid: int, ram: 'GuestRam') -> Sample:
    """Measure process pid, whose guest RAM is ram."""
    status = _read_fields(f'/proc/{pid}/status')
    return Sample(allocated=ram.allocated(),
                  rss=status['VmRSS'],
                  rss_peak=status['VmHWM'],
                  rss_anon=status['RssAnon'],
                  rss_file=status['RssFile'],
                  rss_shmem=status['RssShmem'],
                  page_tables=status['VmPTE'])


def reset_rss_peak(pid: int) -> None:
    """Let process pid's rss_peak count from now on."""
    with open(f'/proc/{pid}/clear_refs', 'w', encoding='ascii') as file:
        file.write('5')         # see proc_pid_clear_refs(5)


# Guest RAM

class GuestRam(Protocol):
    """RAM of a running guest, seen from outside.

    Nothing may be held open between calls: an open memfd keeps its pages
    after the guest is killed, when somebody wants that memory back.

    size: bytes of RAM.
    base: where RAM begins in the descriptor that open() returns.
    """
    size: int
    base: int

    def allocated(self) -> Optional[int]:
        """Bytes allocated by the file, None if there is no file."""

    def open(self) -> int:
        """A descriptor on which pread()/pwrite() reach the RAM."""

    def extents(self, fd: int) -> Iterator[Extent]:
        """Where there is data; all else is a hole or the zero page."""


def file_extents(fd: int, size: int) -> Iterator[Extent]:
    """Data extents of a file, in order.

    On hugetlbfs it is one extent, the whole file: more reading, same result.
    """
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:    # only a hole up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < end:
            yield start, end


class FileRam:
    """RAM in a memfd or another file that the process has open."""
    base = 0

    def __init__(self, pid: int, size: int, name: str):
        """Find the file of process pid by its size and by the start of its
        name as /proc/PID/fd shows it, e.g. '/memfd:memory-backend-memfd'.
        """
        self.size = size
        self._path = self._find(pid, size, name)

    @staticmethod
    def _find(pid: int, size: int, name: str) -> str:
        directory = f'/proc/{pid}/fd'
        found = {}
        for fd in os.listdir(directory):
            path = f'{directory}/{fd}'
            try:
                if not os.readlink(path).startswith(name):
                    continue
                status = os.stat(path)
            except FileNotFoundError:       # closed meanwhile
                continue
            if status.st_size == size:
                found[status.st_dev, status.st_ino] = path
        if len(found) != 1:
            raise RuntimeError(f'process {pid} has {len(found)} files '
                               f'{name} of {size} bytes, expected one')
        return found.popitem()[1]

    def allocated(self) -> int:
        return os.stat(self._path).st_blocks * _ST_BLOCK_SIZE

    def open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def extents(self, fd: int) -> Iterator[Extent]:
        return file_extents(fd, self.size)


# /proc/PID/pagemap: an entry of 64 bits a page, whose top byte has these
# (Documentation/admin-guide/mm/pagemap.rst)
_PAGEMAP_ENTRY = 8
_PAGEMAP_PRESENT = 1 << (63 - 56)
_PAGEMAP_SWAPPED = 1 << (62 - 56)
_PAGEMAP_EXCLUSIVE = 1 << (56 - 56)
_PAGEMAP_CHUNK = 4 * MIB


def _flag_table(mask: int) -> bytes:
    """For bytes.translate(): 1 for a top byte that has any bit of mask."""
    return bytes(1 if top & mask else 0 for top in range(256))


# The zero page is present, but never "exclusively mapped"
_HAS_DATA = _flag_table(_PAGEMAP_SWAPPED | _PAGEMAP_EXCLUSIVE)
_IS_MAPPED = _flag_table(_PAGEMAP_SWAPPED | _PAGEMAP_PRESENT)


def flag_extents(flags: bytes) -> Iterator[Extent]:
    """Runs of b'\\1' in a string of b'\\0' and b'\\1'."""
    end = 0
    while True:
        start = flags.find(b'\1', end)
        if start < 0:
            return
        end = flags.find(b'\0', start)
        if end < 0:
            end = len(flags)
        yield start, end


class AnonymousRam:
    """Private anonymous RAM (memory-backend-ram) that nothing may share.

    KSM has to be kept off it (merge=off): a merged page is not exclusive.
    """

    def __init__(self, pid: int, size: int):
        self.size = size
        self._pid = pid
        self.base = self._find(pid, size)

    @staticmethod
    def _find(pid: int, size: int) -> int:
        found = []
        with open(f'/proc/{pid}/maps', encoding='utf-8') as lines:
            for line in lines:
                start, end = (int(x, 16)
                              for x in line.split(maxsplit=1)[0].split('-'))
                if end - start == size:
                    found.append(start)
        if len(found) != 1:
            raise RuntimeError(f'process {pid} has {len(found)} mappings '
                               f'of {size} bytes, expected one')
        return found[0]

    def allocated(self) -> None:
        return None

    def open(self) -> int:
        return os.open(f'/proc/{self._pid}/mem', os.O_RDWR | os.O_CLOEXEC)

    def extents(self, fd: int) -> Iterator[Extent]:
        return _pagemap_extents(self._pid, self.base, self.size, _HAS_DATA)


def _pagemap_extents(pid: int, base: int, size: int,
                     flag_table: bytes) -> Iterator[Extent]:
    """Where flag_table has 1 for the top byte of a page's pagemap entry.

    base: address of the first page in process pid; the extents count from
    there.
    """
    first = base // PAGE_SIZE
    pages = size // PAGE_SIZE
    step = _PAGEMAP_CHUNK // _PAGEMAP_ENTRY
    pagemap = os.open(f'/proc/{pid}/pagemap', os.O_RDONLY | os.O_CLOEXEC)
    try:
        for done in range(0, pages, step):
            entries = _pread_all(pagemap, (first + done) * _PAGEMAP_ENTRY,
                                 min(step, pages - done) * _PAGEMAP_ENTRY)
            flags = entries[7::_PAGEMAP_ENTRY].translate(flag_table)
            for start, end in flag_extents(flags):
                yield (done + start) * PAGE_SIZE, (done + end) * PAGE_SIZE
    finally:
        os.close(pagemap)


def own_extents(pid: int, base: int, size: int) -> Iterator[Extent]:
    """Pages that process pid shares with nobody, from address base on.

    Of private memory, those that it has written; also if swapped out.
    """
    return _pagemap_extents(pid, base, size, _HAS_DATA)


def mapped_extents(pid: int, base: int, size: int) -> Iterator[Extent]:
    """Pages that are in the page tables of process pid, or swapped out."""
    return _pagemap_extents(pid, base, size, _IS_MAPPED)


class PrivateFileRam:
    """RAM that is a private mapping of a file (share=off).

    What the process wrote is its own and not in the file; what it only read
    is in the file, where the read allocated it.
    """

    def __init__(self, pid: int, size: int, name: str):
        """As FileRam."""
        self.size = size
        self._file = FileRam(pid, size, name)
        self._pid = pid
        self._name = name
        self.base = min(self._mappings())

    def _mappings(self) -> Dict[int, int]:
        """Address, and bytes that are the process's own, of each part."""
        mappings: Dict[int, int] = {}
        start = None
        with open(f'/proc/{self._pid}/smaps', encoding='utf-8',
                  errors='replace') as lines:
            for line in lines:
                words = line.split(maxsplit=5)
                if re.fullmatch(r'[0-9a-f]+-[0-9a-f]+', words[0]):
                    mine = len(words) > 5 and words[5].startswith(self._name)
                    start = int(words[0].split('-')[0], 16) if mine else None
                elif start is not None and words[0] == 'Anonymous:':
                    mappings[start] = int(words[1]) * KIB
        if not mappings:
            raise RuntimeError(f'process {self._pid} does not map '
                               f'{self._name}')
        return mappings

    def allocated(self) -> int:
        return self._file.allocated() + sum(self._mappings().values())

    def open(self) -> int:
        return os.open(f'/proc/{self._pid}/mem', os.O_RDWR | os.O_CLOEXEC)

    def extents(self, fd: int) -> Iterator[Extent]:
        """Reading the rest would allocate it in the file."""
        in_file = self._file.open()
        try:
            return iter(merge_extents(
                self._file.extents(in_file),
                _pagemap_extents(self._pid, self.base, self.size,
                                 _IS_MAPPED)))
        finally:
            os.close(in_file)


def _pread_all(fd: int, offset: int, length: int) -> bytes:
    """pread() of all of it; a short one means that the guest is gone."""
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            raise OSError(errno.EIO, 'guest RAM ends early')
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)


# Comparing

def merge_extents(one: Iterable[Extent],
                  other: Iterable[Extent]) -> List[Extent]:
    """Everything that is in either; sorted, neither touching nor overlapping.
    """
    merged: List[Extent] = []
    for start, end in sorted([*one, *other]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True)
class Comparison:
    """How the RAM of two guests differs.

    bytes_read: what was read on each side; all else is a hole on both.
    bytes_nonzero: pages, among those, that hold anything but zeroes.
    first_difference: offset of the first page that differs, or None.
    """
    bytes_read: int
    bytes_nonzero: int
    differing_pages: int
    first_difference: Optional[int]

    @property
    def identical(self) -> bool:
        return self.differing_pages == 0


def _pages(data: bytes) -> Iterator[bytes]:
    return (data[i:i + PAGE_SIZE] for i in range(0, len(data), PAGE_SIZE))


_ZERO_CHUNK = bytes(_COMPARE_CHUNK)
_ZERO_PAGE = bytes(PAGE_SIZE)


def _count_nonzero_pages(data: bytes) -> int:
    if data == _ZERO_CHUNK:
        return 0
    return sum(page != _ZERO_PAGE for page in _pages(data))


def _read_both(one: GuestRam, other: GuestRam) \
        -> Iterator[Tuple[int, bytes, bytes]]:
    """Offset and content, a chunk at a time, wherever either has data."""
    fds = []
    try:
        fds += [one.open()]
        fds += [other.open()]
        for start, end in merge_extents(one.extents(fds[0]),
                                        other.extents(fds[1])):
            for offset in range(start, end, _COMPARE_CHUNK):
                length = min(_COMPARE_CHUNK, end - offset)
                yield (offset,
                       _pread_all(fds[0], one.base + offset, length),
                       _pread_all(fds[1], other.base + offset, length))
    finally:
        for fd in fds:
            os.close(fd)


def compare(one: GuestRam, other: GuestRam) -> Comparison:
    """Compare two guests that do not run, page by page."""
    if one.size != other.size:
        raise ValueError(f'RAM of {one.size} and of {other.size} bytes')
    read = nonzero = 0
    differing: List[int] = []
    for offset, left, right in _read_both(one, other):
        read += len(left)
        nonzero += _count_nonzero_pages(left)
        if left != right:
            differing += [offset + i * PAGE_SIZE for i, pages
                          in enumerate(zip(_pages(left), _pages(right)))
                          if pages[0] != pages[1]]
    return Comparison(read, nonzero * PAGE_SIZE, len(differing),
                      differing[0] if differing else None)


# Giving a guest something to carry

# Single pages to write, at most, and how much RAM there is for each at least:
# with transparent huge pages every one of them may cost 2 MiB.
_SINGLE_PAGES = 64
_SINGLE_PAGE_DISTANCE = 16 * MIB


def data_layout(size: int, amount: int) -> List[Extent]:
    """Where to put this amount of data into RAM of this size.

    Some of it in single pages all over, the last page of RAM included, the
    rest in one run from the middle on.  Sorted, page aligned, not
    overlapping; less than amount if RAM is too small for that.
    """
    amount = min(amount, size // 2)
    single = min(_SINGLE_PAGES, size // _SINGLE_PAGE_DISTANCE,
                 amount // PAGE_SIZE)
    run = (amount // PAGE_SIZE - single) * PAGE_SIZE
    middle = size // 2 // PAGE_SIZE * PAGE_SIZE
    layout = [(middle, middle + run)] if run else []
    if single:
        step = size // single // PAGE_SIZE * PAGE_SIZE
        ends = (size - i * step for i in range(single))
        layout += [(end - PAGE_SIZE, end) for end in ends
                   if not middle < end <= middle + run]
    return sorted(layout)


def write_data(ram: GuestRam, amount: int) -> int:
    """Put this amount of data into holes of guest RAM; returns how much was.

    What the guest has there is left alone.  The guest does not see it come,
    nor does its dirty log: only for before a migration.  No two pages have
    the same content, so that one at the wrong place is noticed.
    """
    noise = random.Random(0).randbytes(PAGE_SIZE)
    written = 0
    fd = ram.open()
    try:
        taken = list(ram.extents(fd))
        for start, end in without(data_layout(ram.size, amount), taken):
            for offset in range(start, end, PAGE_SIZE):
                page = offset.to_bytes(8, 'little') + noise[8:]
                written += os.pwrite(fd, page, ram.base + offset)
    finally:
        os.close(fd)
    return written


def without(extents: Iterable[Extent],
            taken: Iterable[Extent]) -> Iterator[Extent]:
    """What is left of extents when the taken ones are cut out."""
    taken = merge_extents(taken, ())
    for start, end in extents:
        for cut_start, cut_end in taken:
            if cut_end <= start:
                continue
            if cut_start >= end:
                break
            if start < cut_start:
                yield start, cut_start
            start = cut_end
        if start < end:
            yield start, end


# One pseudo-random block, written again and again with its pages numbered,
# is as good as random data for anything that looks at one page at a time
_FILL_BLOCK = 16 * MIB
_WORD = 8                       # bytes of a page's number


def _numbered(block: bytearray, first: int) -> bytearray:
    """Number the pages of block from first on, in their first bytes."""
    words = memoryview(block).cast('Q')
    count = len(block) // PAGE_SIZE
    words[::PAGE_SIZE // _WORD] = memoryview(
        array('Q', range(first, first + count)))
    return block


def fill(ram: GuestRam, step: int = 1) -> int:
    """Put data into every step-th page, from the first; returns how much.

    Overwrites what is there: for a guest that never runs.  No two pages have
    the same content, and none compresses or is zero.
    """
    if ram.size % PAGE_SIZE:
        raise ValueError(f'RAM of {ram.size} bytes is not whole pages')
    noise = random.Random(0).randbytes(min(_FILL_BLOCK, ram.size))
    block = bytearray(noise)
    written = 0
    fd = ram.open()
    try:
        for offset in range(0, ram.size, len(noise)):
            length = min(len(noise), ram.size - offset)
            view = memoryview(_numbered(block, 1 + offset // PAGE_SIZE))
            written += _pwrite_pages(fd, view[:length], ram.base + offset,
                                     step)
    finally:
        os.close(fd)
    return written


# What scatter() writes at one place
EXTENT = 64 * KIB


def scatter(ram: GuestRam, amount: int) -> int:
    """Spread data over RAM, in extents of EXTENT; returns how much.

    Page for page it is the data that fill() puts into RAM of that size.  The
    extents are somewhere in parts of RAM of the same size, always at the same
    places.  At the start of each part, they could all lie across the border of
    two page tables.
    """
    count = amount // EXTENT
    if amount % EXTENT or not 0 < amount <= ram.size:
        raise ValueError(f'{amount} bytes in {ram.size} bytes of RAM')
    distance = ram.size // count // PAGE_SIZE * PAGE_SIZE
    places = random.Random(0)
    block = bytearray(random.Random(0).randbytes(_FILL_BLOCK))
    per_block = _FILL_BLOCK // EXTENT
    written = 0
    fd = ram.open()
    try:
        for first in range(0, count, per_block):
            view = memoryview(_numbered(block,
                                        1 + first * EXTENT // PAGE_SIZE))
            for number in range(first, min(first + per_block, count)):
                at = (number - first) * EXTENT
                where = (number * distance +
                         places.randrange(distance // EXTENT) * EXTENT)
                written += _pwrite_all(fd, view[at:at + EXTENT],
                                       ram.base + where)
    finally:
        os.close(fd)
    return written


def _pwrite_pages(fd: int, data: memoryview, offset: int, step: int) -> int:
    """pwrite() every step-th page of data, or all at once."""
    if step == 1:
        return _pwrite_all(fd, data, offset)
    return sum(_pwrite_all(fd, data[start:start + PAGE_SIZE], offset + start)
               for start in range(0, len(data), step * PAGE_SIZE))


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    """pwrite(), also for hugetlbfs, which knows mappings only."""
    try:
        return os.pwrite(fd, data, offset)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
    with mmap.mmap(fd, len(data), offset=offset) as area:
        return area.write(data)


def _pwrite_all(fd: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        written = _pwrite(fd, data[done:], offset + done)
        if not written:
            raise OSError(errno.EIO, 'guest RAM ends early')
        done += written
    return done


def require_linux() -> None:
    """Raise UserError where /proc is not Linux's."""
    if not os.path.exists('/proc/self/pagemap'):
        raise UserError('this needs Linux with /proc mounted')
