# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of what makes and watches a real guest; none is started."""

import lzma
import os
import tempfile
import time
import unittest

from lab import UserError
from lab.guest import __main__ as real_guest, linux
from lab.memory import GIB, MIB, PAGE_SIZE
from lab.tests import Memfd

LINE = ('load: 12 s, 345 written, 6789 checked, 10 freed, 2048 KiB MemFree, '
        '0 errors, end')


class Initramfs(unittest.TestCase):
    """The archive."""

    def test_entry(self):
        entry = linux.cpio_entry('ab', 0o100644, b'12345')
        self.assertEqual(entry[:6], b'070701')
        self.assertEqual(int(entry[14:22], 16), 0o100644)
        self.assertEqual(int(entry[54:62], 16), 5)
        # name with its end, both padded to 4 bytes
        self.assertEqual(int(entry[94:102], 16), 3)
        self.assertEqual(entry[110:], b'ab\0' + bytes(3) + b'12345' + bytes(3))

    def test_device(self):
        entry = linux.cpio_entry('console', 0o020600, device=(5, 1))
        self.assertEqual((int(entry[78:86], 16), int(entry[86:94], 16)), (5, 1))

    def test_end(self):
        self.assertIn(b'TRAILER!!!', linux.cpio_archive([]))


class Lines(unittest.TestCase):
    """What the guest says."""

    def test_progress(self):
        progress = linux.parse_progress(LINE)
        self.assertEqual((progress.written, progress.checked, progress.freed,
                          progress.free, progress.errors),
                         (345, 6789, 10, 2 * MIB, 0))

    def test_cut_off(self):
        for length in range(len(LINE)):
            self.assertIsNone(linux.parse_progress(LINE[:length]))

    def test_trouble(self):
        for line in ('load: ERROR worker 0, page 1: word 2 is 0x0',
                     LINE.replace('0 errors', '1 errors'),
                     '[ 1.2] BUG: Bad page state in process guest-load',
                     '[ 1.2] BUG: unable to handle page fault',
                     '[ 1.2] Kernel panic - not syncing',
                     'guest-load[70]: segfault at 0 ip 0'):
            self.assertTrue(linux.is_trouble(line), line)

    def test_no_trouble(self):
        for line in (LINE, LINE[:30], '',
                     'watchdog: BUG: soft lockup - CPU#0 stuck for 22s!'):
            self.assertFalse(linux.is_trouble(line), line)

    def test_console(self):
        with tempfile.TemporaryDirectory() as directory:
            console = linux.Console(os.path.join(directory, 'log'))
            console._add(LINE)
            self.assertEqual(len(console.reports()), 1)
            self.assertIsNone(console.trouble())
            console._add('load: ERROR x')
            self.assertEqual(console.trouble(), 'load: ERROR x')
            # It does not wait for a load that is broken
            started = time.monotonic()
            console.wait_for_reports(10, 30)
            self.assertLess(time.monotonic() - started, 10)


def load_page(first: int) -> bytes:
    """As guest-load.c would write it."""
    return b''.join((first + word).to_bytes(8, 'little')
                    for word in range(PAGE_SIZE // 8))


class LostWrites(unittest.TestCase):
    """lose_writes() changes what is the load's, and nothing else."""

    def test_pages(self):
        other = bytes(range(256)) * (PAGE_SIZE // 256)
        pages = [bytes(PAGE_SIZE), load_page(1 << 40), other, load_page(77),
                 load_page(5)]
        ram = Memfd(self, len(pages) * PAGE_SIZE)
        os.pwrite(ram.fd, b''.join(pages), 0)
        self.assertEqual(linux.lose_writes(ram.ram, 2), 2)
        self.assertEqual([ram.page(number) for number in range(len(pages))],
                         [bytes(PAGE_SIZE), bytes(PAGE_SIZE), other,
                          bytes(PAGE_SIZE), load_page(5)])


class ModulesTest(unittest.TestCase):
    """Modules of a kernel that was unpacked."""

    def setUp(self) -> None:
        self.package = self.enterContext(tempfile.TemporaryDirectory())
        self.drivers = f'{self.package}/usr/lib/modules/6.12/kernel/drivers'
        os.makedirs(self.drivers)
        with open(f'{self.drivers}/../../modules.builtin', 'w',
                  encoding='utf-8') as file:
            file.write('kernel/drivers/virtio/virtio_ring.ko\n')

    def test_found(self) -> None:
        """Compressed or not, and those that are built in are left out."""
        with lzma.open(f'{self.drivers}/virtio_balloon.ko.xz', 'w') as file:
            file.write(b'balloon')
        with open(f'{self.drivers}/virtio-rng.ko', 'wb') as file:
            file.write(b'rng')
        self.assertEqual(
            linux.modules(self.package, ('virtio-ring', 'virtio_balloon',
                                         'virtio-rng')),
            {'virtio_balloon.ko': b'balloon', 'virtio-rng.ko': b'rng'})

    def test_missing(self) -> None:
        """A module that is nowhere is not left out silently."""
        with self.assertRaisesRegex(UserError, 'no module virtio_balloon'):
            linux.modules(self.package, ('virtio_balloon',))


class Complaints(unittest.TestCase):
    """What a hop may leave behind."""

    @staticmethod
    def count(source: int, destination: int) -> int:
        """Complaints about a guest that used 1 GiB; what the sides have."""
        return len(real_guest.complaints(real_guest.Hop(
            'precopy', GIB, GIB, source, destination, 1.0)))

    def test_sparse(self):
        self.assertEqual(self.count(GIB, GIB), 0)
        self.assertEqual(self.count(GIB, GIB // 2), 0)

    def test_full(self):
        self.assertEqual(self.count(64 * GIB, 64 * GIB), 2)
        self.assertEqual(self.count(64 * GIB, GIB), 1)
        # The destination is full, and has more than the source, too
        self.assertEqual(self.count(GIB, 64 * GIB), 2)

    def test_growing(self):
        self.assertEqual(self.count(GIB // 2, GIB), 1)
