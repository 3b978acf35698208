# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM: its kinds, and that of a running QEMU, seen from outside.

Nothing here reads mapped guest RAM: a load from a mapped hole of a shared file
allocates a page, and the measurement would make what it measures.  pread()
returns zeroes for a hole and allocates nothing.

All sizes and offsets are in bytes, unless a name says otherwise; offsets count
from the start of a block.
"""

import errno
import mmap
import os
import re
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import (TYPE_CHECKING, ContextManager, Dict, Iterable, Iterator, List,
                    Optional, Tuple, Union)

from lab.host import SHM
from lab.memory import KIB, MIB, PAGE_SIZE, read_fields

if TYPE_CHECKING:
    from lab.qemu import Qemu

HUGE_PAGE = 2 * MIB

# st_blocks counts these, whatever the file's own block size is (stat(2))
_ST_BLOCK_SIZE = 512

Extent = Tuple[int, int]        # start, end (exclusive)
Bytes = Union[bytes, bytearray, memoryview]


@dataclass(frozen=True)
class Kind:
    """A kind of guest RAM.

    options: of -object, without what object() adds.
    shared: a shared mapping, also if without share=on.
    fs: what its file is on: tmpfs, hugetlbfs, other; None if anonymous.
    directory: for a file that is made before QEMU starts; '' is that of the
    test; None: there is none.
    reserved: whether that file has all its blocks from the start.
    offset: whether the block begins somewhere in the file.
    """
    options: str
    shared: bool
    fs: Optional[str]
    directory: Optional[str] = None
    reserved: bool = False
    offset: bool = False

    @property
    def holes_known(self) -> bool:
        """Whether the kernel can tell its holes."""
        return self.shared and self.fs in ('tmpfs', 'hugetlbfs')

    @property
    def is_freed(self) -> bool:
        """Whether the patched QEMU frees what becomes zero: QEMU has made it itself.
        """
        return self.holes_known and 'memory-backend-file' not in self.options

    def object(self, name: str, size: int, file: str = '', reserve: bool = True) -> str:
        """The value of -object.

        file: the one that was made before.
        reserve: set memory aside for the holes of private memory, too.
        """
        # With KSM, what a process has for itself could not be told
        return (f'{self.options},id={name},size={size},merge=off'
                + (f',mem-path={file}' if self.directory is not None else '')
                + ('' if reserve or self.shared else ',reserve=off'))


_HUGETLB = 'hugetlb=on,hugetlbsize=2M'

KINDS = {
    'memfd': Kind('memory-backend-memfd,share=on', True, 'tmpfs'),
    'memfd-prealloc': Kind('memory-backend-memfd,share=on,prealloc=on', True,
                           'tmpfs'),
    'memfd-private': Kind('memory-backend-memfd,share=off', False, 'tmpfs'),
    'hugetlb': Kind(f'memory-backend-memfd,share=on,{_HUGETLB}', True,
                    'hugetlbfs'),
    # As large as nobody has huge pages, if it stays sparse
    'hugetlb-unreserved': Kind(
        f'memory-backend-memfd,share=on,{_HUGETLB},reserve=off', True,
        'hugetlbfs'),
    'hugetlb-private': Kind(f'memory-backend-memfd,share=off,{_HUGETLB}',
                            False, 'hugetlbfs'),
    'shm': Kind('memory-backend-shm', True, 'tmpfs'),
    # Given a directory, QEMU removes the file as soon as it is open
    'shm-directory': Kind(f'memory-backend-file,share=on,mem-path={SHM}', True,
                          'tmpfs'),
    'shm-directory-private': Kind(
        f'memory-backend-file,share=off,mem-path={SHM}', False, 'tmpfs'),
    'shm-file': Kind('memory-backend-file,share=on', True, 'tmpfs', SHM),
    'shm-file-private': Kind('memory-backend-file,share=off', False, 'tmpfs',
                             SHM),
    'shm-file-offset': Kind('memory-backend-file,share=on', True, 'tmpfs', SHM,
                            offset=True),
    # By fallocate()
    'reserved': Kind('memory-backend-file,share=on', True, 'tmpfs', SHM,
                     reserved=True),
    'other-file': Kind('memory-backend-file,share=on', True, 'other', ''),
    'other-file-private': Kind('memory-backend-file,share=off', False, 'other',
                               ''),
    'anonymous': Kind('memory-backend-ram', False, None),
    'anonymous-shared': Kind('memory-backend-ram,share=on', True, 'tmpfs'),
}


# Extents

def merge_extents(one: Iterable[Extent], other: Iterable[Extent]) -> List[Extent]:
    """Everything that is in either; sorted, neither touching nor overlapping.
    """
    merged: List[Extent] = []
    for start, end in sorted([*one, *other]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def without(extents: Iterable[Extent], taken: Iterable[Extent]) -> Iterator[Extent]:
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


# /proc/PID/pagemap: an entry of 64 bits a page, whose top byte has these
# (Documentation/admin-guide/mm/pagemap.rst)
_PAGEMAP_ENTRY = 8
_PAGEMAP_SWAPPED = 1 << (62 - 56)
_PAGEMAP_EXCLUSIVE = 1 << (56 - 56)
_PAGEMAP_CHUNK = 4 * MIB


# For bytes.translate(): 1 for the top byte of a page that has data.  The zero page is
# present, but never "exclusively mapped".
_HAS_DATA = bytes(bool(top & (_PAGEMAP_SWAPPED | _PAGEMAP_EXCLUSIVE))
                  for top in range(256))


# Reading and writing

@contextmanager
def _closing(fd: int) -> Iterator[int]:
    """A descriptor, for a with statement."""
    try:
        yield fd
    finally:
        os.close(fd)


def pread_all(fd: int, offset: int, length: int) -> bytes:
    """pread() of all of it; a short one means that the guest is gone."""
    parts = []
    while length:
        part = os.pread(fd, min(length, 16 * MIB), offset)
        if not part:
            raise OSError(errno.EIO, 'guest RAM ends early')
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)


def pwrite_all(fd: int, data: Bytes, offset: int) -> int:
    """pwrite() of all of it, also to hugetlbfs; returns how much it was."""
    rest = memoryview(data)
    while rest:
        written = _pwrite(fd, rest, offset)
        if not written:
            raise OSError(errno.EIO, 'guest RAM ends early')
        offset += written
        rest = rest[written:]
    return len(data)


def _pwrite(fd: int, data: memoryview, offset: int) -> int:
    try:
        return os.pwrite(fd, data, offset)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
    # hugetlbfs knows mappings only
    start = offset % HUGE_PAGE
    length = min(-(-(start + len(data)) // HUGE_PAGE) * HUGE_PAGE,
                 os.fstat(fd).st_size - offset + start)
    with mmap.mmap(fd, length, offset=offset - start) as area:
        area[start:start + len(data)] = data
    return len(data)


class Writer:
    """Writes to a block, from outside: no dirty log notices."""

    def __init__(self, fd: int, base: int):
        self._fd = fd
        self._base = base

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of data at offset of the block."""
        pwrite_all(self._fd, data, self._base + offset)


# A process

@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps."""
    start: int
    end: int
    shared: bool
    offset: int
    device: int
    inode: int
    path: str

    @classmethod
    def parse(cls, line: str) -> 'Mapping':
        """7f00-7f10 rw-s 00001000 00:01 42    /memfd:x (deleted)"""
        fields = line.rstrip('\n').split(maxsplit=5)
        addresses, flags, offset, device, inode = fields[:5]
        start, end = (int(part, 16) for part in addresses.split('-'))
        major, minor = (int(part, 16) for part in device.split(':'))
        return cls(start, end, 's' in flags, int(offset, 16),
                   os.makedev(major, minor), int(inode),
                   ''.join(fields[5:]))

    @classmethod
    def all_of(cls, pid: int) -> Iterator['Mapping']:
        """Those of a process."""
        with open(f'/proc/{pid}/maps', encoding='utf-8', errors='replace') as lines:
            yield from map(cls.parse, lines)

    @property
    def has_file(self) -> bool:
        """Whether there is one that somebody can open."""
        return bool(self.inode) and not self.path.startswith('/dev/zero')

    def is_of(self, file: os.stat_result, link: str) -> bool:
        """Whether it is a mapping of a file that the process has open.

        link: where /proc/PID/fd says that the file is.
        """
        # stat(2) and /proc/PID/maps can disagree on the device: on btrfs and
        # overlayfs, it is not the one of the file system
        return file.st_ino == self.inode and (file.st_dev == self.device
                                              or link == self.path)


def _path_of(pid: int, mapping: Mapping) -> Optional[str]:
    """What to open to get at the file of a mapping; None if anonymous."""
    if not mapping.has_file:
        return None
    directory = f'/proc/{pid}/fd'
    for fd in os.listdir(directory):
        path = f'{directory}/{fd}'
        try:
            if mapping.is_of(os.stat(path), os.readlink(path)):
                return path
        except FileNotFoundError:       # closed meanwhile
            continue
    raise RuntimeError(f'process {pid} has no descriptor of inode '
                       f'{mapping.inode}, which is mapped')


class Ram:
    """A RAM block of a running QEMU, seen from outside.

    Nothing is held open between calls: an open memfd keeps its pages after the
    guest is killed, when somebody wants that memory back.

    size, address: of the block in the process.
    path: of its file; None if it has none that can be opened.
    shared: whether it is a shared mapping.
    file_offset: where the block begins in its file.
    huge: whether it is on hugetlbfs.
    base: where the block begins in the descriptor that opened() gives.
    """

    def __init__(self, pid: int, address: int, size: int):
        mapping = next((each for each in Mapping.all_of(pid)
                        if each.start <= address < each.end), None)
        if not mapping:
            raise RuntimeError(f'process {pid} has nothing mapped at '
                               f'{address:#x}')
        self._pid = pid
        self.size = size
        self.address = address
        self.shared = mapping.shared
        self.file_offset = mapping.offset + address - mapping.start
        self.path = _path_of(pid, mapping)
        self.huge = bool(self.path) and os.statvfs(str(self.path)).f_bsize >= HUGE_PAGE
        self.base = self.file_offset if self._is_file else address

    @classmethod
    def of(cls, pid: int, size: int, has_file: bool) -> 'Ram':
        """The only block of its size that a process has."""
        found = [each.start for each in Mapping.all_of(pid)
                 if each.end - each.start == size
                 and (each.inode or not has_file)]
        if len(found) != 1:
            raise RuntimeError(f'process {pid} has {len(found)} mappings of '
                               f'{size} bytes, expected one')
        return cls(pid, found[0], size)

    @property
    def _is_file(self) -> bool:
        """Whether all that it has is in the file."""
        return self.shared and self.path is not None

    def allocated(self) -> Optional[int]:
        """Bytes that its file has allocated, and of a private mapping those of
        the process, too.  None if there is no file.
        """
        if self.path is None:
            return None
        in_file = os.stat(self.path).st_blocks * _ST_BLOCK_SIZE
        return in_file + (0 if self.shared else self._anonymous())

    def _anonymous(self) -> int:
        """Bytes that are the process's own."""
        inside, total = False, 0
        with open(f'/proc/{self._pid}/smaps', encoding='utf-8',
                  errors='replace') as lines:
            for line in lines:
                match = re.match(r'([0-9a-f]+)-[0-9a-f]+ ', line)
                if match:
                    inside = (self.address <= int(match[1], 16)
                              < self.address + self.size)
                elif inside and line.startswith('Anonymous:'):
                    total += int(line.split()[1]) * KIB
        return total

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor on which pread() and pwrite() reach it, from base on."""
        with self._opened_file() if self._is_file else self._opened_memory() as fd:
            yield fd

    def _opened_memory(self) -> 'ContextManager[int]':
        return _closing(os.open(f'/proc/{self._pid}/mem', os.O_RDWR | os.O_CLOEXEC))

    def _opened_file(self) -> 'ContextManager[int]':
        assert self.path
        # memory-backend-shm lets nobody open its file, but it is ours
        if not os.stat(self.path).st_mode & stat.S_IRUSR:
            os.chmod(self.path, 0o600)
        return _closing(os.open(self.path, os.O_RDWR | os.O_CLOEXEC))

    def _own_extents(self) -> Iterator[Extent]:
        """Pages that the process shares with nobody; also if swapped out."""
        pages = self.size // PAGE_SIZE
        step = _PAGEMAP_CHUNK // _PAGEMAP_ENTRY
        first = self.address // PAGE_SIZE
        with open(f'/proc/{self._pid}/pagemap', 'rb', buffering=0) as file:
            for done in range(0, pages, step):
                entries = pread_all(
                    file.fileno(), (first + done) * _PAGEMAP_ENTRY,
                    min(step, pages - done) * _PAGEMAP_ENTRY)
                flags = entries[7::_PAGEMAP_ENTRY].translate(_HAS_DATA)
                for start, end in flag_extents(flags):
                    yield (done + start) * PAGE_SIZE, (done + end) * PAGE_SIZE

    def _file_extents(self) -> List[Extent]:
        with self._opened_file() as fd:
            return [(max(start - self.file_offset, 0), stop - self.file_offset)
                    for start, stop in file_extents(fd, self.file_offset + self.size)
                    if stop > self.file_offset]

    def extents(self) -> Iterator[Extent]:
        """Where there are pages, of this process or of the file.

        The kernel's zero page, which a read of anonymous memory maps, is none.
        hugetlbfs only tells how many there are: there, it is all.
        """
        if self._is_file:
            yield from self._file_extents()
        elif self.path is None:
            yield from self._own_extents()
        else:
            yield from merge_extents(self._own_extents(), self._file_extents())

    def read(self, offset: int = 0, length: Optional[int] = None) -> bytes:
        """Its content, to its end if there is no length.

        This populates a private mapping, or its file: ask extents() before.
        A file is read as one, which populates nothing.
        """
        if length is None:
            length = self.size - offset
        with self.opened() as fd:
            return pread_all(fd, self.base + offset, length)

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of data at offset."""
        with self.opened() as fd:
            pwrite_all(fd, data, self.base + offset)

    @contextmanager
    def writer(self, in_process: bool) -> Iterator[Writer]:
        """To write from outside.

        in_process: through the memory of the process, which gets page tables,
        and pages of its own in a private mapping, as if it had written that;
        else to the file.
        """
        with self._opened_memory() if in_process else self._opened_file() as fd:
            yield Writer(fd, self.address if in_process else self.file_offset)


_BLOCK_LINE = re.compile(r'\s*(\S+)\s+\d+ \w+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)'
                         r'\s+0x[0-9a-f]+\s+0x([0-9a-f]+)')


def parse_blocks(text: str) -> Dict[str, Tuple[int, int]]:
    """What 'info ramblock' prints: address and size, by name."""
    return {match[1]: (int(match[3], 16), int(match[2], 16))
            for match in map(_BLOCK_LINE.match, text.splitlines()) if match}


def find_blocks(qemu: 'Qemu') -> Dict[str, Ram]:
    """All RAM blocks of a QEMU, by name.  That of a backend is its id."""
    return {name: Ram(qemu.pid, *where) for name, where
            in parse_blocks(qemu.hmp('info ramblock')).items()}


@dataclass(frozen=True)
class Sample:
    """Memory of one guest at one moment.

    allocated: see Ram.allocated().
    The rest is from /proc/PID/status and belongs to the whole process.
    rss_peak: the highest rss since the process started, or since
    reset_rss_peak().
    """
    allocated: Optional[int]
    rss: int
    rss_peak: int
    rss_anon: int
    page_tables: int


def sample(pid: int, ram: Ram) -> Sample:
    """Measure process pid, whose guest RAM is ram."""
    status = read_fields(f'/proc/{pid}/status')
    return Sample(allocated=ram.allocated(),
                  rss=status['VmRSS'],
                  rss_peak=status['VmHWM'],
                  rss_anon=status['RssAnon'],
                  page_tables=status['VmPTE'])


def reset_rss_peak(pid: int) -> None:
    """Let process pid's rss_peak count from now on."""
    with open(f'/proc/{pid}/clear_refs', 'w', encoding='ascii') as file:
        file.write('5')         # see proc_pid_clear_refs(5)
