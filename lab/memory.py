# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of this machine, and sizes as text."""

import errno
import mmap
import os
import re
import resource
from functools import lru_cache
from typing import Callable, Dict, List, Optional, Tuple

from lab import UserError
from lab.cgroup import own_directories
from lab.outcome import Unavailable

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

PAGE_SIZE = os.sysconf('SC_PAGE_SIZE')

# Guests smaller than this show nothing
SMALLEST = 64 * MIB


def read_fields(path: str) -> Dict[str, int]:
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
_CGROUP_V2 = ('memory.max', 'memory.current', ('active_file', 'inactive_file'))


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
        statistics = dict(line.split() for line in read('memory.stat').splitlines())
        cache = sum(int(statistics[name]) for name in of_files)
        return most - max(0, int(read(usage)) - cache)
    except (OSError, ValueError, KeyError):     # no such file, or "max"
        return None


@lru_cache(maxsize=None)
def _own_cgroups() -> Tuple[bool, List[str]]:
    try:
        return own_directories('memory')
    except Unavailable:
        return True, []


def available() -> int:
    """Memory that can be allocated now without swapping or an OOM kill."""
    free = read_fields('/proc/meminfo')['MemAvailable']
    version_2, directories = _own_cgroups()
    for directory in directories:
        headroom = cgroup_headroom(directory, version_2)
        if headroom is not None:
            free = max(0, min(free, headroom))
    return free


def total() -> int:
    """All the memory of the machine."""
    return read_fields('/proc/meminfo')['MemTotal']


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


def survivable(wanted: int, available: int, floor: int) -> int:
    """The size, at most wanted, at which both sides may fill up entirely.

    All in bytes.  floor is what has to stay available.
    """
    return halve_until(wanted, lambda size: 2 * size + floor <= available)


def largest_mappable(wanted: int) -> int:
    """The size, at most wanted, of a memfd that can be mapped here."""
    return halve_until(wanted, lambda size: not check_mappable(size))


def parse_size(text: str) -> int:
    """'256G', '64M', '4GiB', as for QEMU's size=.  Raises ValueError."""
    match = re.fullmatch(r'(\d+)\s*([KMGT])(i?B)?', text, re.IGNORECASE)
    if not match:
        raise ValueError(f'{text!r} is not a size like 256G or 64M')
    return int(match[1]) << 10 * (1 + 'KMGT'.index(match[2].upper()))


def require_linux() -> None:
    """Raise UserError where /proc is not Linux's."""
    if not os.path.exists('/proc/self/pagemap'):
        raise UserError('this needs Linux with /proc mounted')
