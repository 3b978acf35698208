# SPDX-License-Identifier: GPL-2.0-or-later
"""The RAM blocks of any running QEMU, one by one.

Where a block is mapped is asked with HMP's "info ramblock", and what it is
mapped from is looked up in /proc: so there may be several blocks of one size
or kind, which lab.memory could not tell apart.  As there, nothing is
populated by looking at it.

All sizes and offsets are in bytes; offsets count from the start of the block.
"""

import mmap
import os
import re
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional

from lab.memory import (PAGE_SIZE, Extent, file_extents, mapped_extents,
                        merge_extents, own_extents)
from lab.qemu import Qemu

_ST_BLOCK_SIZE = 512            # of st_blocks, see stat(2)


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

    def is_of(self, file: os.stat_result, link: str) -> bool:
        """Whether it is a mapping of a file that the process has open.

        link: where /proc/PID/fd says that the file is.
        """
        # stat(2) and /proc/PID/maps can disagree on the device: on btrfs and
        # overlayfs, it is not the one of the file system
        return file.st_ino == self.inode and (file.st_dev == self.device
                                              or link == self.path)


def _mapping_at(pid: int, address: int) -> Mapping:
    with open(f'/proc/{pid}/maps', encoding='utf-8',
              errors='replace') as lines:
        for line in lines:
            mapping = Mapping.parse(line)
            if mapping.start <= address < mapping.end:
                return mapping
    raise RuntimeError(f'process {pid} has nothing mapped at {address:#x}')


def _path_of(pid: int, mapping: Mapping) -> Optional[str]:
    """What to open to get at the file of a mapping; None if anonymous."""
    if not mapping.inode:
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


class Block:
    """One RAM block of a running QEMU.

    name, size, address: as QEMU says; address is that in its process.
    page_size: of its backend; larger than PAGE_SIZE with hugetlbfs.
    shared: whether it is a shared mapping.
    file_offset: where the block begins in its file.
    """

    # pylint: disable=too-many-instance-attributes

    def __init__(self, pid: int, name: str, size: int, address: int,
                 page_size: int):
        # pylint: disable=too-many-arguments
        mapping = _mapping_at(pid, address)
        self.name = name
        self.size = size
        self.address = address
        self.page_size = page_size
        self.shared = mapping.shared
        self.file_offset = mapping.offset + address - mapping.start
        self._pid = pid
        self._path = _path_of(pid, mapping)

    @property
    def has_file(self) -> bool:
        """Whether it is a mapping of a file, be it shared or private."""
        return self._path is not None

    @property
    def huge(self) -> bool:
        """Whether it is on hugetlbfs."""
        return self.page_size > PAGE_SIZE

    def allocated(self) -> int:
        """What all of its file has allocated; 0 if there is none."""
        if not self._path:
            return 0
        return os.stat(self._path).st_blocks * _ST_BLOCK_SIZE

    @contextmanager
    def _opened_file(self) -> Iterator[int]:
        assert self._path
        # memory-backend-shm lets nobody open its file, but it is ours
        if not os.stat(self._path).st_mode & stat.S_IRUSR:
            os.chmod(self._path, 0o600)
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _opened_memory(self) -> Iterator[int]:
        fd = os.open(f'/proc/{self._pid}/mem', os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def _file_extents(self) -> List[Extent]:
        """In the block, not in the file."""
        with self._opened_file() as fd:
            end = self.file_offset + self.size
            return [(max(start - self.file_offset, 0),
                     stop - self.file_offset)
                    for start, stop in file_extents(fd, end)
                    if stop > self.file_offset]

    def populated(self) -> Optional[List[Extent]]:
        """Where there are pages, of this process or of the file.

        The kernel's zero page, which a read of anonymous memory maps, is none.
        None with hugetlbfs, which only tells how many there are: allocated().
        """
        if self.huge:
            return None
        if self.shared:
            return self._file_extents()
        own = own_extents(self._pid, self.address, self.size)
        return merge_extents(own, self._file_extents()) if self._path else \
            list(own)

    def mapped(self) -> List[Extent]:
        """Where there is something in the page tables of the process."""
        return list(mapped_extents(self._pid, self.address, self.size))

    def read(self, offset: int = 0, length: Optional[int] = None) -> bytes:
        """Its content, to its end if there is no length.

        This populates a private mapping, or its file: ask populated() before.
        A file is read as one, which populates nothing.
        """
        if length is None:
            length = self.size - offset
        if self._path and self.shared:
            with self._opened_file() as fd:
                return _read_all(fd, self.file_offset + offset, length)
        with self._opened_memory() as fd:
            return _read_all(fd, self.address + offset, length)

    @contextmanager
    def writer(self, in_process: bool) -> Iterator['Writer']:
        """To write from outside, which no dirty log notices.

        in_process: through the memory of the process, which gets page tables,
        and pages of its own in a private mapping, as if it had written that;
        else to the file.
        """
        if in_process:
            with self._opened_memory() as fd:
                yield Writer(fd, self.address)
            return
        with self._opened_file() as fd:
            if not self.huge:
                yield Writer(fd, self.file_offset)
                return
            # hugetlbfs has no write()
            with mmap.mmap(fd, self.size, offset=self.file_offset) as memory:
                yield _MappedWriter(memory)


def _read_all(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, min(length, 1 << 24), offset)
        if not part:
            raise OSError('guest RAM ends early')
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b''.join(parts)


class Writer:
    """Writes to a RAM block."""

    def __init__(self, fd: int, base: int):
        self._fd = fd
        self._base = base

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of data at offset of the block."""
        while data:
            written = os.pwrite(self._fd, data, self._base + offset)
            offset += written
            data = data[written:]


class _MappedWriter(Writer):
    def __init__(self, memory: mmap.mmap):
        super().__init__(-1, 0)
        self._memory = memory

    def write(self, offset: int, data: memoryview) -> None:
        self._memory[offset:offset + len(data)] = data


_BLOCK_LINE = re.compile(r'\s*(?P<name>\S+)\s+(?P<page>\d+ \w+)'
                         r'\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)'
                         r'\s+0x[0-9a-f]+\s+0x(?P<address>[0-9a-f]+)')

_UNITS = {'KiB': 1 << 10, 'MiB': 1 << 20, 'GiB': 1 << 30}


def parse_blocks(text: str) -> Dict[str, Dict[str, int]]:
    """What 'info ramblock' prints: size, address and page_size, by name."""
    found = {}
    for line in text.splitlines():
        match = _BLOCK_LINE.match(line)
        if match:
            count, unit = match['page'].split()
            found[match['name']] = {'size': int(match['used'], 16),
                                    'address': int(match['address'], 16),
                                    'page_size': int(count) * _UNITS[unit]}
    return found


def find_blocks(qemu: Qemu) -> Dict[str, Block]:
    """All RAM blocks of a QEMU, by name.  That of a backend is its id."""
    return {name: Block(qemu.pid, name, **where) for name, where
            in parse_blocks(qemu.hmp('info ramblock')).items()}
