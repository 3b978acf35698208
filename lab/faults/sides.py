# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMUs, with RAM of each kind, and what they hold."""

import ctypes
import errno
import glob
import mmap
import os
import random
import shutil
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

from lab import content, host
from lab.cgroup import Cgroup
from lab.faults.failcalls import FailCalls, Rule
from lab.host import SHM
from lab.memory import MIB, PAGE_SIZE
from lab.outcome import Unavailable
from lab.qemu import Guest
from lab.ram import HUGE_PAGE, Extent, Ram, merge_extents, pread_all


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

def threads(pid: int) -> Iterator[Tuple[int, str, str]]:
    """Number, name, and where in the kernel it waits, of each thread of a process."""
    for task in sorted(glob.glob(f'/proc/{pid}/task/*')):
        with suppress(OSError), \
             open(f'{task}/comm', encoding='utf-8') as comm, \
             open(f'{task}/wchan', encoding='ascii') as wchan:
            yield (int(os.path.basename(task)), comm.read().strip(),
                   wchan.read().strip())


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
    return '\n'.join(f'{thread} {name}: {where}'
                     for thread, name, where in threads(pid))


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
        extra: Dict[str, str] = {}
        if kind == 'anonymous-shared':
            extra['FAIL_CALLS_MMAP'] = str(errno.ENODEV)
        super().__init__(name, binary, size,
                         backend='shm-file' if kind == 'tmpfs' else kind,
                         ram_file=path, paused=True, incoming=incoming, cgroup=cgroup,
                         wrapper=fail_calls.command(extra) if fail_calls else (),
                         extra_args=('-name', f'{name},debug-threads=on',
                                     *extra_args))
        self.size = size
        self.kind = kind
        self.fail_calls = fail_calls
        self.killed = False
        self.stacks = ''

    def kill(self) -> None:
        """Kill it, as the fault that the case is about; from any thread."""
        self.killed = True
        super().kill_now()

    def kill_now(self) -> None:
        """What the watchdog does: it hangs.  Remembers where."""
        self.stacks = stacks(self.pid, self.use_gdb)
        super().kill_now()

    def said(self) -> str:
        """What it has said so far."""
        try:
            with open(self._vm._qemu_log_path, encoding='utf-8',
                      errors='replace') as log:
                return log.read()
        except (OSError, TypeError):    # it is over
            return ''

    def arm(self, rules: Sequence[Rule]) -> None:
        """Let calls fail from now on."""
        assert self.fail_calls
        self.fail_calls.arm(rules, self.ram.path or '')

    def write(self, offset: int, data: bytes) -> None:
        """Write to RAM, as a guest does but unnoticed by its dirty log."""
        with self.ram.writer(True) as writer:
            writer.write(offset, data)


# What RAM holds

class Snapshot(Ram):
    """A copy of a guest's RAM, in memory of this process."""

    def __init__(self, ram: Ram):
        self._fd = os.memfd_create('snapshot', os.MFD_CLOEXEC)
        os.ftruncate(self._fd, ram.size)
        self._area = mmap.mmap(self._fd, ram.size)
        super().__init__(os.getpid(), ctypes.addressof(
            ctypes.c_char.from_buffer(self._area)), ram.size)
        with ram.opened() as fd:
            for start, end in list(ram.extents()):
                for offset in range(start, end, MIB):
                    self._write_pages(offset, pread_all(
                        fd, ram.base + offset, min(MIB, end - offset)))

    def _write_pages(self, offset: int, data: bytes) -> None:
        """Only what is not zero, so that the rest stays a hole."""
        if not data.strip(b'\0'):
            return
        for start in range(0, len(data), PAGE_SIZE):
            page = data[start:start + PAGE_SIZE]
            if page.strip(b'\0'):
                os.pwrite(self._fd, page, offset + start)

    def patch(self, offset: int, data: bytes) -> None:
        """Something that was written since."""
        os.pwrite(self._fd, data, offset)

    def units(self, unit: int) -> Set[int]:
        """Numbers of the parts of this size that have data."""
        return {number for start, end in self.extents()
                for number in range(start // unit, -(-end // unit))}

    def close(self) -> None:
        """Free it."""
        self._area.close()
        os.close(self._fd)


@dataclass(frozen=True)
class Layout:
    """Where there is something in RAM: extents in bytes, not overlapping."""
    data: Tuple[Extent, ...]
    zeroes: Tuple[Extent, ...]


def draw_layout(dice: random.Random, size: int, data: int, zeroes: int) -> Layout:
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
            extents += [(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in mine]
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


def old_file(path: str, size: int, dice: random.Random, layout: Layout) -> None:
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
    if kind in ('anonymous', 'anonymous-shared') and huge_pages_enabled():
        return HUGE_PAGE
    return PAGE_SIZE if kind == 'anonymous' else host.shmem_unit()


def allocated(side: Side) -> int:
    """Bytes of RAM that a QEMU has, also where there is no file."""
    bytes_of_file = side.ram.allocated()
    if bytes_of_file is not None:
        return bytes_of_file
    return content.total(list(side.ram.extents()))


def ram_path(directory: str, name: str) -> str:
    """Where a file that is RAM goes; directory: that of the case."""
    return os.path.join(SHM, f'{os.path.basename(directory)}-{name}')
