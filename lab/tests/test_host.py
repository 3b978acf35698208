# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/host.py."""

import fcntl
import os
import sys
import tempfile
import unittest
from unittest import mock


from lab import host
from lab.outcome import Unavailable
from lab.memory import MIB, PAGE_SIZE

NOBODY = 65534


class Cpus(unittest.TestCase):
    def cpus(self, files, version_2=True, affinity=8):
        """With these files in the directory of a cgroup."""
        with tempfile.TemporaryDirectory() as directory:
            for name, text in files.items():
                with open(f'{directory}/{name}', 'w', encoding='ascii') as file:
                    file.write(text)
            with mock.patch.object(host, 'own_directories', lambda _: (
                    version_2, [directory, '/nonexistent'])), \
                 mock.patch.object(os, 'sched_getaffinity',
                                   lambda _: set(range(affinity))):
                return host.cpus()

    def test_version_2(self):
        for text, count in (('max 100000\n', 8), ('150000 100000\n', 2),
                            ('1000 100000\n', 1), ('9900000 100000\n', 8)):
            self.assertEqual(self.cpus({'cpu.max': text}), count)

    def test_version_1(self):
        for quota, count in (('-1\n', 8), ('300000\n', 3)):
            self.assertEqual(self.cpus({'cpu.cfs_quota_us': quota,
                                        'cpu.cfs_period_us': '100000\n'},
                                       version_2=False), count)

    def test_no_limit(self):
        self.assertEqual(self.cpus({}), 8)
        with mock.patch.object(host, 'own_directories', side_effect=Unavailable):
            self.assertEqual(host.cpus(), len(os.sched_getaffinity(0)))


class Files(unittest.TestCase):
    def test_free_shm(self):
        for blocks, free, can_write, expected in (
                (16384, 100, True, 100 * 4096), (16384, 100, False, 0),
                (0, 0, True, sys.maxsize)):
            with mock.patch.object(os, 'statvfs') as statvfs, \
                 mock.patch.object(os, 'access', lambda *_, can=can_write: can):
                statvfs.return_value.f_blocks = blocks
                statvfs.return_value.f_bavail = free
                statvfs.return_value.f_frsize = 4096
                self.assertEqual(host.free_shm(), expected)
        with mock.patch.object(os, 'statvfs', side_effect=FileNotFoundError):
            self.assertEqual(host.free_shm(), 0)


class ShmemUnit(unittest.TestCase):
    def test_setting(self):
        for setting, unit in (
                ('always within_size advise [never] deny force', 4096),
                ('always within_size advise never [deny] force', 4096),
                ('always within_size [advise] never deny force', 2 * MIB),
                ('[always] within_size advise never deny force', 2 * MIB)):
            with tempfile.NamedTemporaryFile('w') as file, \
                 mock.patch.object(host, '_SHMEM_ENABLED', file.name), \
                 mock.patch.object(host, 'PAGE_SIZE', 4096):
                file.write(setting)
                file.flush()
                self.assertEqual(host.shmem_unit(), unit)
        with mock.patch.object(host, '_SHMEM_ENABLED', '/nonexistent'):
            self.assertEqual(host.shmem_unit(), PAGE_SIZE)


class HugePages(unittest.TestCase):
    def test_one_at_a_time(self):
        with tempfile.TemporaryDirectory() as directory, \
             mock.patch.object(host, '_HUGE_PAGES', directory):
            for name, text in (('free', '70\n'), ('resv', '6\n')):
                with open(f'{directory}/{name}_hugepages', 'w',
                          encoding='ascii') as file:
                    file.write(text)
            other = os.open(directory, os.O_RDONLY)
            self.addCleanup(os.close, other)
            with host.locked_huge_pages(64):
                with self.assertRaises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self.assertRaisesRegex(Unavailable, 'fewer than 65'), \
                 host.locked_huge_pages(65):
                pass
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_none(self):
        with mock.patch.object(host, '_HUGE_PAGES', '/nonexistent'), \
             self.assertRaises(Unavailable), host.locked_huge_pages(1):
            pass


class Userfaultfd(unittest.TestCase):
    @staticmethod
    def works_for(user: int) -> bool:
        """Asked by a process of that user."""
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                os._exit(0 if host.userfaultfd_works() else 1)
            finally:
                os._exit(2)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status not in (0, 1):
            raise AssertionError(f'exit status {status}')
        return status == 0

    def test_who_may_not(self):
        if os.geteuid():
            self.skipTest('only root can be somebody else')
        with open('/proc/sys/vm/unprivileged_userfaultfd', encoding='ascii') as file:
            for_all = file.read().strip() == '1'
        if for_all or os.path.exists('/dev/userfaultfd') and \
                os.stat('/dev/userfaultfd').st_mode & 0o006:
            self.skipTest('everybody may use userfaultfd here')
        self.assertFalse(self.works_for(NOBODY))

    def test_leaves_nothing_open(self):
        before = os.listdir('/proc/self/fd')
        host.userfaultfd_works()
        self.assertEqual(os.listdir('/proc/self/fd'), before)

    def test_either_is_enough(self):
        def works(call: int, **arguments) -> bool:
            with mock.patch.object(host.ctypes, 'CDLL') as libc, \
                 mock.patch.object(host, '_userfaultfd_by_device',
                                   lambda: True):
                libc.return_value.syscall.return_value = call
                return host.userfaultfd_works(**arguments)

        self.assertTrue(works(-1))
        self.assertFalse(works(-1, by_device=False))
        self.assertTrue(works(os.open('/dev/null', os.O_RDONLY), by_device=False))
