# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/, for unittest; none needs more than this machine."""

import ctypes
import mmap
import os
import unittest

from lab.ram import Ram

# Whoever runs the tests may be unknown to git, and no test must depend on it
NAME, MAIL = 'Erika Mustermann', 'erika@example.org'
WHO = {'GIT_AUTHOR_NAME': NAME, 'GIT_AUTHOR_EMAIL': MAIL,
       'GIT_COMMITTER_NAME': NAME, 'GIT_COMMITTER_EMAIL': MAIL}


def read(path: str) -> str:
    """All of a file."""
    with open(path, encoding='utf-8') as file:
        return file.read()


def mapped_ram(test: unittest.TestCase, fd: int, size: int,
               flags: int = mmap.MAP_SHARED) -> 'tuple[mmap.mmap, Ram]':
    """A mapping of this process, without huge pages, as if it were a guest's RAM;
    it ends with the test.
    """
    area = mmap.mmap(fd, size, flags=flags)
    test.addCleanup(area.close)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return area, Ram(os.getpid(), address, size)


class Memfd:
    """A memfd of this process, seen as if it were a guest's RAM."""

    def __init__(self, test: unittest.TestCase, size: int):
        self.fd = os.memfd_create('test')
        test.addCleanup(os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.ram = mapped_ram(test, self.fd, size)[1]

    def page(self, number: int) -> bytes:
        """What is there."""
        return os.pread(self.fd, mmap.PAGESIZE, number * mmap.PAGESIZE)
