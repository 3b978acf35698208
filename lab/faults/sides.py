# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMUs, with RAM of each kind, and what they hold."""

import errno
import glob
import os
import random
import re
import shutil
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

from lab import host
from lab.cgroup import Cgroup
from lab.faults.cases import number_of
from lab.faults.failcalls import FailCalls, Rule
from lab.host import SHM
from lab.memory import (MIB, PAGE_SIZE, AnonymousRam, Extent, FileRam,
                        GuestRam, file_extents, merge_extents)
from lab.qemu import BACKENDS, Backend, Guest


HUGE_PAGE = 2 * MIB


class Unavailable(Exception):
    """This machine does not have what a case needs; says what."""


# Kinds of RAM

def _file_backend(path: str) -> Backend:
    return Backend(f'memory-backend-file,share=on,mem-path={path}',
                   lambda pid, size: FileRam(pid, size, path))


def _backend(kind: str, path: str) -> Backend:
    """path: of the file, for kinds that have one."""
    if kind in ('shm-file', 'tmpfs'):
        return _file_backend(path)
    if kind == 'shared-anonymous':
        return Backend('memory-backend-ram,share=on,merge=off', AnonymousRam)
    return BACKENDS[{'hugetlb': 'memfd-hugetlb'}.get(kind, kind)]


@contextmanager
def small_tmpfs(directory: str, size: int) -> Iterator[str]:
    """A tmpfs of this size; removed when it is not used any more."""
    path = os.path.join(directory, 'tmpfs')
    os.mkdir(path)
    result = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', path],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
        text=True)
    if result.returncode:
        os.rmdir(path)
        raise Unavailable('a tmpfs of limited size needs root (mount: '
                          f'{result.stderr.strip()})')
    try:
        yield path
    finally:
        subprocess.run(['umount', '--lazy', path], check=False)
        os.rmdir(path)


# A QEMU

def stacks(pid: int, use_gdb: bool) -> str:
    """Where the threads of a process that hangs are, for whoever looks."""
    if use_gdb and shutil.which('gdb'):
        with suppress(subprocess.TimeoutExpired):
            result = subprocess.run(
                ['gdb', '-p', str(pid), '-batch', '-ex',
                 'thread apply all bt 16'], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                check=False, timeout=120, text=True)
            return '\n'.join(line for line in result.stdout.splitlines()
                             if line.startswith(('#', 'Thread')))
    lines = []
    for task in sorted(glob.glob(f'/proc/{pid}/task/*')):
        with suppress(OSError), \
             open(f'{task}/comm', encoding='utf-8') as comm, \
             open(f'{task}/wchan', encoding='utf-8') as wchan:
            lines.append(f'{os.path.basename(task)} {comm.read().strip()}: '
                         f'{wchan.read().strip()}')
    return '\n'.join(lines)


class Side(Guest):
    """A QEMU of a case, stopped (-S).

    use_gdb: say where one that hangs is.
    """
    use_gdb = False

    def __init__(self, name: str, binary: str, size: int, kind: str, *,
                 path: str = '', incoming: bool = False,
                 fail_calls: Optional[FailCalls] = None,
                 cgroup: Optional[Cgroup] = None,
                 extra_args: Sequence[str] = ()):
        """
        kind: of RAM, see cases.BACKENDS
        path: of the file that is RAM, if it is a file
        """
        backend = _backend(kind, path)
        BACKENDS[backend.options] = backend
        super().__init__(name, binary, size, backend=backend.options,
                         paused=True, incoming=incoming, cgroup=cgroup,
                         extra_args=('-name', f'{name},debug-threads=on',
                                     *extra_args))
        self.size = size
        self.kind = kind
        self.fail_calls = fail_calls
        self.killed = False
        self.stacks = ''
        extra: Dict[str, str] = {}
        if kind == 'shared-anonymous':
            extra['FAIL_CALLS_MMAP'] = str(errno.ENODEV)
        if fail_calls:
            self._wrapper = (*self._wrapper, *fail_calls.command(extra))
        self.base = 0

    def _start(self) -> None:
        super()._start()
        # All kinds are one mapping of this size
        self.base = AnonymousRam(self.pid, self.size).base

    def kill(self) -> None:
        """Kill it, as the fault that the case is about; from any thread."""
        self.killed = True
        super().kill_now()

    def kill_now(self) -> None:
        """What the watchdog does: it hangs.  Remembers where."""
        self.stacks = stacks(self.pid, self.use_gdb)
        super().kill_now()

    def ended(self) -> Optional[int]:
        """Exit status, or minus the signal; None if it is alive."""
        return self._vm.exitcode()

    def said(self) -> str:
        """What it has said so far."""
        # pylint: disable=protected-access
        try:
            with open(self._vm._qemu_log_path, encoding='utf-8',
                      errors='replace') as log:
                return log.read()
        except (OSError, TypeError):    # it is over
            return ''

    def bury(self) -> str:
        """Kill it, return all that it has said."""
        self._vm.kill()
        return self._vm.get_log() or ''

    def ram_file(self) -> str:
        """Path of the file that is RAM, '' if there is none."""
        directory = f'/proc/{self.pid}/fd'
        for fd in os.listdir(directory):
            path = f'{directory}/{fd}'
            try:
                status = os.stat(path)
                name = os.readlink(path)
            except OSError:
                continue
            if status.st_size == self.size and \
                    name.startswith(('/memfd:', '/')) and \
                    self._maps_file(status.st_ino):
                return path
        return ''

    def _maps_file(self, inode: int) -> bool:
        with open(f'/proc/{self.pid}/maps', encoding='utf-8') as lines:
            for line in lines:
                words = line.split()
                if int(words[0].split('-')[0], 16) == self.base:
                    return int(words[4]) == inode
        return False

    def arm(self, rules: Sequence[Rule]) -> None:
        """Let calls fail from now on."""
        assert self.fail_calls
        self.fail_calls.arm([(rule, number_of(rule.error)) for rule in rules],
                            self.ram_file())

    def write(self, offset: int, data: bytes) -> None:
        """Write to RAM, as a guest does but unnoticed by its dirty log."""
        with open(f'/proc/{self.pid}/mem', 'r+b', buffering=0) as mem:
            mem.seek(self.base + offset)
            if mem.write(data) != len(data):
                raise OSError(errno.EIO, 'guest RAM ends early')


# What RAM holds

class Snapshot:
    """A copy of a guest's RAM, as a GuestRam."""
    base = 0

    def __init__(self, ram: GuestRam):
        self.size = ram.size
        self._fd = os.memfd_create('snapshot', os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self.size)
        fd = ram.open()
        try:
            for start, end in list(ram.extents(fd)):
                for offset in range(start, end, MIB):
                    length = min(MIB, end - offset)
                    data = os.pread(fd, length, ram.base + offset)
                    if len(data) != length:
                        raise OSError(errno.EIO, 'guest RAM ends early')
                    self._write_pages(offset, data)
        finally:
            os.close(fd)

    def _write_pages(self, offset: int, data: bytes) -> None:
        """Only what is not zero, so that the rest stays a hole."""
        if not data.strip(b'\0'):
            return
        for start in range(0, len(data), PAGE_SIZE):
            page = data[start:start + PAGE_SIZE]
            if page.strip(b'\0'):
                os.pwrite(self._fd, page, offset + start)

    def allocated(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def open(self) -> int:
        return os.dup(self._fd)

    def extents(self, fd: int) -> Iterator[Extent]:
        return file_extents(fd, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """What is there."""
        return os.pread(self._fd, length, offset)

    def patch(self, offset: int, data: bytes) -> None:
        """Something that was written since."""
        os.pwrite(self._fd, data, offset)

    def units(self, unit: int) -> Set[int]:
        """Numbers of the parts of this size that have data."""
        return {number for start, end in self.extents(self._fd)
                for number in range(start // unit, -(-end // unit))}

    def close(self) -> None:
        """Free it."""
        os.close(self._fd)


@dataclass(frozen=True)
class Layout:
    """Where there is something in RAM: extents in bytes, not overlapping."""
    data: Tuple[Extent, ...]
    zeroes: Tuple[Extent, ...]


def draw_layout(dice: random.Random, size: int, data: int,
                zeroes: int) -> Layout:
    """Spread this much over RAM, in runs of 1 to 128 pages."""
    pages = size // PAGE_SIZE
    taken: Set[int] = set()

    def spread(amount: int) -> Tuple[Extent, ...]:
        left = min(amount // PAGE_SIZE, pages // 2)
        extents: List[Extent] = []
        while left > 0:
            length = min(left, int(2 ** dice.uniform(0, 7)))
            start = dice.randrange(pages - length + 1)
            mine = set(range(start, start + length)) - taken
            taken.update(mine)
            extents += [(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                        for page in mine]
            left -= len(mine)
        return tuple(merge_extents(extents, ()))

    return Layout(spread(data), spread(zeroes))


def write_layout(side: Side, dice: random.Random, layout: Layout) -> None:
    """Give a guest's RAM what the layout says."""
    for start, end in layout.data:
        side.write(start, b''.join(
            (start + at).to_bytes(8, 'little') + dice.randbytes(PAGE_SIZE - 8)
            for at in range(0, end - start, PAGE_SIZE)))
    for start, end in layout.zeroes:
        side.write(start, bytes(end - start))


def old_file(path: str, size: int, dice: random.Random,
             layout: Layout) -> None:
    """A file that an earlier guest has left."""
    with open(path, 'wb') as file:
        file.truncate(size)
        for start, end in layout.data:
            file.seek(start)
            file.write(dice.randbytes(end - start))


def huge_pages_enabled() -> bool:
    """Whether anonymous memory may get huge pages without asking."""
    try:
        with open('/sys/kernel/mm/transparent_hugepage/enabled',
                  encoding='ascii') as file:
            return '[never]' not in file.read()
    except OSError:
        return False


def allocation_unit(kind: str) -> int:
    """As much as one page of data may allocate."""
    if kind == 'hugetlb':
        return HUGE_PAGE
    if kind in ('anonymous', 'shared-anonymous') and huge_pages_enabled():
        return HUGE_PAGE
    return PAGE_SIZE if kind == 'anonymous' else host.shmem_unit()


def allocated(side: Side) -> int:
    """Bytes of RAM that a QEMU has, also where there is no file."""
    bytes_of_file = side.ram.allocated()
    if bytes_of_file is not None:
        return bytes_of_file
    if side.kind == 'shared-anonymous':
        return _shared_anonymous(side)
    fd = side.ram.open()
    try:
        return sum(end - start for start, end in side.ram.extents(fd))
    finally:
        os.close(fd)


def _shared_anonymous(side: Side) -> int:
    """Its file is one of the kernel's, that nobody can open."""
    inside = False
    with open(f'/proc/{side.pid}/smaps', encoding='utf-8',
              errors='replace') as lines:
        for line in lines:
            if re.match(r'[0-9a-f]+-[0-9a-f]+ ', line):
                inside = int(line.split('-')[0], 16) == side.base
            elif inside and line.startswith('Rss:'):
                return int(line.split()[1]) * 1024
    raise RuntimeError('RAM is not mapped')


def ram_path(directory: str, name: str) -> str:
    """Where a file that is RAM goes; directory: that of the case."""
    return os.path.join(SHM, f'{os.path.basename(directory)}-{name}')
