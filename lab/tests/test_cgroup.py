# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/cgroup.py."""

import errno
import os
import subprocess
import sys
import tempfile
import unittest
from unittest import mock


from lab import cgroup
from lab.cgroup import Cgroup
from lab.outcome import Unavailable
from lab.memory import MIB

MOUNTS = """\
31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
32 24 0:28 /box /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup none rw,memory
33 24 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
"""


class Parse(unittest.TestCase):
    def test_version_1(self):
        self.assertEqual(cgroup.parse_own('5:memory:/a/b\n0::/\n'), (False, '/a/b'))
        self.assertEqual(cgroup.parse_own('0::/\n5:cpu,memory:/a:b\n'), (False, '/a:b'))

    def test_version_2(self):
        self.assertEqual(cgroup.parse_own('0::/user.slice/x\n'),
                         (True, '/user.slice/x'))
        self.assertEqual(cgroup.parse_own('3:cpu:/\n0::/x\n'), (True, '/x'))

    def test_neither(self):
        self.assertIsNone(cgroup.parse_own('3:cpu:/\n1:name=memory:/\n'))

    def test_mount(self):
        self.assertEqual(cgroup.parse_mount(MOUNTS, False),
                         ('/box', '/sys/fs/cgroup/memory'))
        self.assertEqual(cgroup.parse_mount(MOUNTS, True),
                         ('/', '/sys/fs/cgroup/unified'))
        self.assertIsNone(cgroup.parse_mount('', True))


class Places(unittest.TestCase):
    def places(self, own):
        texts = {'/proc/self/cgroup': own, '/proc/self/mountinfo': MOUNTS}
        with mock.patch.object(cgroup, '_read', texts.__getitem__):
            return cgroup._places()[1]

    def test_own_first_then_those_above(self):
        self.assertEqual(self.places('0::/a/b\n'), [
            f'/sys/fs/cgroup/unified{each}' for each in ('/a/b', '/a', '')])
        self.assertEqual(self.places('0::/\n'), ['/sys/fs/cgroup/unified'])

    def test_only_a_part_is_mounted(self):
        self.assertEqual(self.places('5:memory:/box/a\n'), [
            f'/sys/fs/cgroup/memory{each}' for each in ('/a', '')])
        with self.assertRaises(Unavailable):
            self.places('5:memory:/other\n')
        with self.assertRaises(Unavailable):
            self.places('0::/../other\n')


class Limit(unittest.TestCase):
    LIMIT = 64 * MIB

    def run_with(self, group, size):
        """Touch so much memory in the cgroup."""
        return subprocess.run(
            [*group.command, sys.executable, '-c',
             f'bytearray({size}).translate(None)'], check=False).returncode

    def test_kills_who_takes_more_and_leaves_nothing(self):
        try:
            with Cgroup(self.LIMIT) as group:
                path = os.path.dirname(group.command[-1])
                self.assertEqual(self.run_with(group, 8 * MIB), 0)
                self.assertEqual(group.oom_kills(), 0)
                self.assertEqual(self.run_with(group, self.LIMIT), -9)
                self.assertEqual(group.oom_kills(), 1)
                peak = group.peak()
                if peak is not None:
                    self.assertGreater(peak, self.LIMIT - 8 * MIB)
                    self.assertLessEqual(peak, self.LIMIT)
        except Unavailable as err:
            self.skipTest(str(err))
        self.assertFalse(os.path.exists(path))

    def test_a_process_may_take_a_while_to_be_gone(self):
        with tempfile.TemporaryDirectory() as directory:
            group = Cgroup(self.LIMIT)
            group._path = directory
            busy = OSError(errno.EBUSY, 'busy')
            with mock.patch.object(os, 'rmdir',
                                   side_effect=[busy, busy, None]) as rmdir:
                group.__exit__()
            self.assertEqual(rmdir.call_count, 3)
            with mock.patch.object(os, 'rmdir', side_effect=busy), \
                 mock.patch.object(cgroup, '_BUSY_SECONDS', 0.05), \
                 self.assertRaises(OSError):
                group.__exit__()

    def test_leave(self):
        try:
            with Cgroup(self.LIMIT) as group:
                group.leave(16 * MIB)
                self.assertLess(group.limit, self.LIMIT)
                self.assertEqual(self.run_with(group, self.LIMIT // 2), -9)
        except Unavailable as err:
            self.skipTest(str(err))

    def test_a_directory_without_controller_is_left_as_it_was(self):
        with tempfile.TemporaryDirectory() as directory, \
             mock.patch.object(cgroup, '_places', lambda: (
                 cgroup._V2, [directory])), \
             self.assertRaises(Unavailable):
            try:
                with Cgroup(self.LIMIT):
                    self.fail('it was made')
            finally:
                self.assertEqual(os.listdir(directory), [])
