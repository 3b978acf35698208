# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel of this machine lets a program have.

How much memory there is, is in lab.memory.
"""

import ctypes
import fcntl
import math
import mmap
import os
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from typing import Iterator, Optional

from lab.cgroup import own_directories
from lab.outcome import Unavailable
from lab.memory import MIB, PAGE_SIZE

SHM = '/dev/shm'
_HUGE_PAGES = '/sys/kernel/mm/hugepages/hugepages-2048kB'
_SHMEM_ENABLED = '/sys/kernel/mm/transparent_hugepage/shmem_enabled'

# userfaultfd(2): its number where that is not the one of asm-generic/unistd.h
_USERFAULTFD = {'x86_64': 323, 's390x': 355, 'ppc64': 364, 'ppc64le': 364}
_USERFAULTFD_GENERIC = 282
_USERFAULTFD_IOC_NEW = 0xaa00   # linux/userfaultfd.h


# Processors

def _quota(directory: str, version_2: bool) -> Optional[float]:
    """Processors that a cgroup may use, None if there is no limit."""
    def read(name: str) -> str:
        with open(f'{directory}/{name}', encoding='ascii') as file:
            return file.read()

    try:
        if version_2:
            quota, period = (int(word) for word in read('cpu.max').split())
        else:
            quota = int(read('cpu.cfs_quota_us'))
            period = int(read('cpu.cfs_period_us'))
    except (OSError, ValueError):       # no such file, or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None


def cpus() -> int:
    """How many processors this process can keep busy, at least one.

    A container may have no more than a part of those that it sees.
    """
    count: float = len(os.sched_getaffinity(0))
    try:
        version_2, directories = own_directories('cpu')
    except Unavailable:
        directories = []
    for directory in directories:
        count = min(count, _quota(directory, version_2) or count)
    return max(1, math.ceil(count))


# Memory

def overcommit_is_strict() -> bool:
    """Whether nothing can be mapped but what there is memory for, not even
    with MAP_NORESERVE.
    """
    with open('/proc/sys/vm/overcommit_memory', encoding='ascii') as file:
        return file.read().strip() == '2'


# Files that are memory

def shmem_unit() -> int:
    """Bytes that one page of data in a memfd may allocate.

    QEMU asks for transparent huge pages, and gets them if "advise" is set.
    """
    try:
        with open(_SHMEM_ENABLED, encoding='ascii') as file:
            setting = file.read()
    except OSError:
        return PAGE_SIZE
    small = '[never]' in setting or '[deny]' in setting
    return PAGE_SIZE if small else 2 * MIB


def free_huge_pages() -> int:
    """Huge pages of 2 MiB that nobody has or has reserved."""
    try:
        with open(f'{_HUGE_PAGES}/free_hugepages', encoding='ascii') as free, \
             open(f'{_HUGE_PAGES}/resv_hugepages',
                  encoding='ascii') as reserved:
            return int(free.read()) - int(reserved.read())
    except OSError:
        return 0


@contextmanager
def locked_huge_pages(needed: int) -> Iterator[None]:
    """Let no other test take huge pages meanwhile.

    Raises Unavailable if fewer than needed are free.  sparse_lock_huge_pages() of
    migration-test takes the same lock.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            lock = os.open(_HUGE_PAGES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if free_huge_pages() < needed:
            raise Unavailable(f'fewer than {needed} free huge pages of 2 MiB '
                              '(sysctl vm.nr_hugepages)')
        yield


def free_shm() -> int:
    """Bytes that can be written to files in /dev/shm; 64 MiB in many a
    container.
    """
    try:
        status = os.statvfs(SHM)
    except OSError:
        return 0
    if not os.access(SHM, os.W_OK):
        return 0
    # A tmpfs of unlimited size has no blocks at all
    return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize


def require_shm(needed: int) -> None:
    """Raise Unavailable if this many bytes cannot be written to /dev/shm."""
    if needed and free_shm() < needed:
        raise Unavailable(f'less than {needed // MIB} MiB free in {SHM}')


def direct_io_works(directory: str) -> bool:
    """Whether a file there can be written with O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=directory) as file, \
         mmap.mmap(-1, PAGE_SIZE) as page:
        try:
            fd = os.open(file.name, os.O_WRONLY | os.O_DIRECT)
        except OSError:
            return False
        try:
            return os.write(fd, page) == len(page)
        except OSError:
            return False
        finally:
            os.close(fd)


# userfaultfd

def _close(fd: int) -> bool:
    """Returns whether there was something to close."""
    if fd < 0:
        return False
    os.close(fd)
    return True


def _userfaultfd_by_device() -> bool:
    try:
        device = os.open('/dev/userfaultfd', os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _close(fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    except OSError:
        return False
    finally:
        os.close(device)


def userfaultfd_works(by_device: bool = True) -> bool:
    """Whether a QEMU that this process starts gets a userfaultfd.

    Tried out, because that depends on who asks, on a sysctl, on a device, and
    on what filters system calls.

    by_device: whether /dev/userfaultfd is as good, which QEMU knows since 8.0.
    """
    number = _USERFAULTFD.get(os.uname().machine, _USERFAULTFD_GENERIC)
    return _close(ctypes.CDLL(None).syscall(number, os.O_CLOEXEC)) or \
        by_device and _userfaultfd_by_device()


def require_userfaultfd(by_device: bool = True) -> None:
    """Raise Unavailable unless userfaultfd_works()."""
    if not userfaultfd_works(by_device):
        raise Unavailable('userfaultfd is not allowed here '
                          '(sysctl vm.unprivileged_userfaultfd)')
