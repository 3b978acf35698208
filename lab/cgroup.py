# SPDX-License-Identifier: GPL-2.0-or-later
"""A memory cgroup, version 1 or 2, for a QEMU that shall be short of memory."""

import errno
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Tuple

from lab.outcome import Unavailable


# For this long, a process that has ended may still count as one of a cgroup
_BUSY_SECONDS = 2.0


@dataclass(frozen=True)
class _Files:
    """What a cgroup's files are called.

    usage: bytes that it has now.
    events: has a line 'oom_kill N'.
    swap, swap_value: what keeps memory from being swapped out instead; None:
    the same value as the limit.
    """
    limit: str
    usage: str
    peak: str
    events: str
    swap: str
    swap_value: Optional[int]


_V1 = _Files('memory.limit_in_bytes', 'memory.usage_in_bytes',
             'memory.max_usage_in_bytes', 'memory.oom_control',
             'memory.memsw.limit_in_bytes', None)
_V2 = _Files('memory.max', 'memory.current', 'memory.peak', 'memory.events',
             'memory.swap.max', 0)


def parse_own(text: str, controller: str = 'memory') -> Optional[Tuple[bool, str]]:
    """Of /proc/self/cgroup: the cgroup that limits memory, or what else the
    controller is for, and whether it is of version 2.
    """
    found = None
    for line in text.splitlines():
        hierarchy, controllers, path = line.split(':', 2)
        if controller in controllers.split(','):
            return False, path
        if hierarchy == '0':
            found = True, path
    return found


def parse_mount(text: str, version_2: bool,
                controller: str = 'memory') -> Optional[Tuple[str, str]]:
    """Of /proc/self/mountinfo: which cgroup is mounted, and where."""
    for line in text.splitlines():
        before, _, after = line.partition(' - ')
        kind, _, options = after.split(' ', 2)
        if (kind == 'cgroup2' if version_2 else
                kind == 'cgroup' and controller in options.split(',')):
            root, where = before.split()[3:5]
            return root, where
    return None


def _read(path: str) -> str:
    with open(path, encoding='utf-8') as file:
        return file.read()


def _write(path: str, value: object) -> None:
    # Unbuffered: the kernel's answer is that of write()
    with open(path, 'wb', buffering=0) as file:
        file.write(str(value).encode('ascii'))


def _upwards(mount: str, path: str) -> Iterator[str]:
    """Directories: that of path, and those above it."""
    path = path.rstrip('/')
    while path:
        yield mount + path
        path = os.path.dirname(path).rstrip('/')
    yield mount


def own_directories(controller: str) -> Tuple[bool, List[str]]:
    """Where the limits of this process are.

    Returns whether they are of version 2, and the directories: that of its own
    cgroup, and those above it.  Raises Unavailable.

    controller: what for, such as 'memory'.
    """
    try:
        own = parse_own(_read('/proc/self/cgroup'), controller)
        mount = own and parse_mount(_read('/proc/self/mountinfo'), own[0], controller)
    except OSError:
        own = mount = None
    if not own or not mount:
        raise Unavailable(f'no {controller} cgroups are mounted')
    version_2, path = own
    root, where = mount
    if root != '/':
        if not path.startswith(root):
            raise Unavailable('the cgroup of this process is not '
                              'visible')
        path = path[len(root):]
    if '/..' in path:
        raise Unavailable('the cgroup of this process is not visible')
    return version_2, list(_upwards(where, path))


def _places() -> Tuple[_Files, List[str]]:
    """The interface, and where a cgroup may be made.

    With version 2, a cgroup that has processes cannot have children with
    limits, but those above it have.
    """
    version_2, directories = own_directories('memory')
    return (_V2 if version_2 else _V1), directories


class Cgroup:
    """A cgroup with a memory limit.  A context manager: made on entry,
    removed on exit, when no process may be left in it.
    """

    def __init__(self, limit: int):
        """limit: bytes of memory, swap included"""
        self.limit = limit
        self._path = ''
        self._files = _V2

    def __enter__(self) -> 'Cgroup':
        """Raises Unavailable."""
        self._files, places = _places()
        for place in places:
            try:
                self._path = tempfile.mkdtemp(prefix='sparse-ram-', dir=place)
            except OSError:
                continue
            try:
                self._set_up()
                return self
            except OSError:
                self.__exit__()
        raise Unavailable(
            'no cgroup with a memory limit can be made: this needs root, or '
            'a cgroup that is delegated with its memory controller')

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                os.rmdir(self._path)
                return
            except OSError as err:
                if err.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _set_up(self) -> None:
        self.oom_kills()
        self._set_limit()
        self._try()

    def leave(self, room: int) -> None:
        """Lower the limit to what is in use now, and this many bytes."""
        used = int(_read(f'{self._path}/{self._files.usage}'))
        self.limit = min(self.limit, used + room)
        self._set_limit()

    def _set_limit(self) -> None:
        files = self._files
        _write(f'{self._path}/{files.limit}', self.limit)
        swap = f'{self._path}/{files.swap}'
        if os.path.exists(swap):        # not without swap in the kernel
            _write(swap, self.limit if files.swap_value is None else files.swap_value)

    def _try(self) -> None:
        """Raise OSError unless a process of this user may be moved there."""
        pid = os.fork()
        if pid == 0:
            try:
                _write(f'{self._path}/cgroup.procs', 0)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            raise PermissionError('cgroup.procs')

    @property
    def command(self) -> Sequence[str]:
        """What to put in front of a command, for it to run in the cgroup."""
        return ('sh', '-ec', 'echo 0 >"$1"; shift; exec "$@"', 'sh',
                f'{self._path}/cgroup.procs')

    def oom_kills(self) -> int:
        """How many processes were killed because it is full."""
        for line in _read(f'{self._path}/{self._files.events}').splitlines():
            name, value = line.split()
            if name == 'oom_kill':
                return int(value)
        raise OSError(f'{self._files.events} has no oom_kill')

    def peak(self) -> Optional[int]:
        """The most bytes it ever had; None if the kernel does not say."""
        try:
            return int(_read(f'{self._path}/{self._files.peak}'))
        except OSError:
            return None
