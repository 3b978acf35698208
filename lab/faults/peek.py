# SPDX-License-Identifier: GPL-2.0-or-later
"""Accesses to the RAM of a running process, while postcopy is active.

process_vm_readv() of a page that userfaultfd has not got yet waits for it, as
the guest would; reading the file, or /proc/PID/mem, does not.
"""

import ctypes
import os
import random
import threading
from typing import List, Optional, Protocol, Set, Tuple

from lab.memory import PAGE_SIZE

_LENGTH = 16            # bytes of an access


class _Iovec(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]


_LIBC = ctypes.CDLL(None, use_errno=True)


def _transfer(function: str, pid: int, address: int,
              buffer: 'ctypes.Array[ctypes.c_char]') -> None:
    local = _Iovec(ctypes.addressof(buffer), len(buffer))
    remote = _Iovec(address, len(buffer))
    done = getattr(_LIBC, function)(pid, ctypes.byref(local), 1,
                                    ctypes.byref(remote), 1, 0)
    if done != len(buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def read(pid: int, address: int, length: int) -> bytes:
    """Read memory of a process; waits until it is there."""
    buffer = ctypes.create_string_buffer(length)
    _transfer('process_vm_readv', pid, address, buffer)
    return buffer.raw


def write(pid: int, address: int, data: bytes) -> None:
    """Write memory of a process; waits until it is there."""
    buffer = ctypes.create_string_buffer(data, len(data))
    _transfer('process_vm_writev', pid, address, buffer)


class Readable(Protocol):
    """A copy of RAM."""
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """What is there."""


class Expected:
    """What RAM has to hold, while several threads write to it.

    Each page is written by one access at most.
    """

    def __init__(self, snapshot: Readable):
        self.snapshot = snapshot
        self._lock = threading.Lock()
        self.writes: List[Tuple[int, bytes]] = []
        self.touched: Set[int] = set()
        self._taken: Set[int] = set()

    def take(self, page: int) -> bool:
        """Reserve a page for one access."""
        with self._lock:
            if page in self._taken:
                return False
            self._taken.add(page)
            return True

    def touch(self, page: int) -> None:
        """A page is going to be accessed, and so populated."""
        with self._lock:
            self.touched.add(page)

    def wrote(self, offset: int, data: bytes) -> None:
        """Something has been written."""
        with self._lock:
            self.writes.append((offset, data))


class Peeker(threading.Thread):
    """Accesses pages in random order, until it is told to stop.

    wrong: what was not what it had to be, in words.
    waiting: the page that it waits for, None if it does not.
    """

    def __init__(self, pid: int, base: int, expected: Expected,
                 dice: random.Random, pages: List[int],
                 writes: float = 0.3):
        """writes: how many of the accesses write, 0 to 1"""
        super().__init__(daemon=True)
        self._pid = pid
        self._base = base
        self._expected = expected
        self._dice = dice
        self._pages = pages
        self._writes = writes
        self._stop_now = threading.Event()
        self.wrong: Optional[str] = None
        self.waiting: Optional[int] = None
        self.done = 0

    def stop(self) -> None:
        """After the access that it is at."""
        self._stop_now.set()

    def run(self) -> None:
        for page in self._pages:
            if self._stop_now.is_set() or self.wrong:
                return
            if self._expected.take(page):
                self._expected.touch(page)
                self.waiting = page
                try:
                    self._access(page)
                except OSError:         # the process is gone
                    return
                self.waiting = None
                self.done += 1
            self._stop_now.wait(self._dice.choice((0, 0, 0.001, 0.01)))

    def _access(self, page: int) -> None:
        offset = (page * PAGE_SIZE
                  + self._dice.randrange(PAGE_SIZE // _LENGTH) * _LENGTH)
        if self._dice.random() < self._writes:
            data = self._dice.randbytes(_LENGTH)
            write(self._pid, self._base + offset, data)
            self._expected.wrote(offset, data)
            return
        data = read(self._pid, self._base + offset, _LENGTH)
        right = self._expected.snapshot.read(offset, _LENGTH)
        if data != right:
            self.wrong = (f'an access at {offset:#x} during postcopy read '
                          f'{data.hex()} and not {right.hex()}')
