# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of what lab/demo.py stands on that need no QEMU."""

import mmap
import os
import tempfile
import threading
import time
import unittest
from unittest import mock

from lab import content, demo, memory, migrate
from lab.measure import report
from lab.memory import GIB, MIB, PAGE_SIZE
from lab.measure.once import MigrateConfig, Pressure, Result
from lab.measure.operation import Times
from lab.migrate import Watchdog
from lab.ram import Sample, flag_extents, merge_extents
from lab.tests import Memfd, mapped_ram


def anonymous_ram(test: unittest.TestCase, size: int):
    """Anonymous memory, and the same as RAM."""
    return mapped_ram(test, -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def sample(allocated=None, rss=0) -> Sample:
    return Sample(allocated, rss, rss, 0, 0)


def result(before, after, source=64 * MIB, differing=0) -> Result:
    """A result whose destination had these allocated, bytes."""
    return Result(
        config=MigrateConfig('a', 1 * GIB), version='10.0.13',
        source_before=sample(source), source_after=sample(source),
        destination_before=sample(before), destination_after=sample(after),
        times=Times(1.0, 1.1),
        comparison=content.Comparison(
            source, source, differing, PAGE_SIZE if differing else None))


class Sizes(unittest.TestCase):
    def test_format(self):
        for size, text in ((256 * GIB, '256 GiB'), (1536 * MIB, '1536 MiB'),
                           (64 * MIB, '64 MiB'), (4096, '4 KiB'),
                           (4097, '4097 bytes')):
            self.assertEqual(memory.format_size(size), text)

    def test_parse(self):
        for text, size in (('256G', 256 * GIB), ('64m', 64 * MIB),
                           ('4GiB', 4 * GIB), ('1 T', 1024 * GIB)):
            self.assertEqual(memory.parse_size(text), size)
        for text in ('', '5', 'G', '-1G', '1.5G', '4X'):
            with self.assertRaises(ValueError):
                memory.parse_size(text)


class Extents(unittest.TestCase):
    def test_merge(self):
        for one, other, merged in (
                ([], [], []),
                ([(0, 1)], [], [(0, 1)]),
                ([(0, 2)], [(1, 3)], [(0, 3)]),
                ([(0, 2)], [(2, 3)], [(0, 3)]),
                ([(0, 9)], [(2, 3)], [(0, 9)]),
                ([(5, 6)], [(1, 2)], [(1, 2), (5, 6)])):
            self.assertEqual(merge_extents(one, other), merged)
            self.assertEqual(merge_extents(other, one), merged)

    def test_flags(self):
        for flags, runs in ((b'', []), (b'\0\0', []), (b'\1', [(0, 1)]),
                            (b'\0\1\1\0\1', [(1, 3), (4, 5)])):
            self.assertEqual(list(flag_extents(flags)), runs)

    def test_of_memfd(self):
        memfd = Memfd(self, 1024 * GIB)
        self.assertEqual(list(memfd.ram.extents()), [])
        os.pwrite(memfd.fd, b'x', 0)
        last = memfd.ram.size - PAGE_SIZE
        os.pwrite(memfd.fd, b'x', last)
        extents = list(memfd.ram.extents())
        self.assertEqual(extents[0][0], 0)
        self.assertEqual(extents[-1][1], memfd.ram.size)
        self.assertLess(sum(end - start for start, end in extents), 16 * MIB)

    def test_of_anonymous_memory(self):
        area, ram = anonymous_ram(self, 67 * MIB)
        area[5 * PAGE_SIZE] = 1
        self.assertEqual(area[9 * PAGE_SIZE], 0)    # maps the zero page
        area[ram.size - 1] = 1
        self.assertEqual(list(ram.extents()), [
            (5 * PAGE_SIZE, 6 * PAGE_SIZE), (ram.size - PAGE_SIZE, ram.size)])


class Layout(unittest.TestCase):
    def test_pages_are_in_bounds_and_apart(self):
        for size in (64 * MIB, 1 * GIB, 256 * GIB, 3 * GIB + PAGE_SIZE):
            for amount in (0, PAGE_SIZE, 1 * MIB, 64 * MIB):
                layout = content.data_layout(size, amount)
                end = 0
                for extent in layout:
                    self.assertGreaterEqual(extent[0], end)
                    self.assertGreater(extent[1], extent[0])
                    self.assertEqual(extent[0] % PAGE_SIZE, 0)
                    end = extent[1]
                self.assertLessEqual(end, size)
                self.assertLessEqual(sum(e - s for s, e in layout), amount)

    def test_reaches_the_last_page(self):
        layout = content.data_layout(256 * GIB, 64 * MIB)
        self.assertEqual(layout[-1], (256 * GIB - PAGE_SIZE, 256 * GIB))
        self.assertGreater(sum(e - s for s, e in layout), 63 * MIB)

    def test_written_data_spares_what_is_there(self):
        memfd = Memfd(self, 64 * MIB)
        there = memfd.ram.size - PAGE_SIZE
        os.pwrite(memfd.fd, b'firmware', there)
        written = content.write_data(memfd.ram, 1 * MIB)
        self.assertEqual(os.pread(memfd.fd, 8, there), b'firmware')
        self.assertGreater(written, 1 * MIB // 2)
        self.assertGreaterEqual(memfd.ram.allocated(), written + PAGE_SIZE)


class Compare(unittest.TestCase):
    SIZE = 64 * MIB

    def setUp(self):
        self.one = Memfd(self, self.SIZE)
        self.other = Memfd(self, self.SIZE)

    def compare(self):
        """Compare, and see that it allocated nothing."""
        before = self.one.ram.allocated(), self.other.ram.allocated()
        comparison = content.compare(self.one.ram, self.other.ram)
        self.assertEqual((self.one.ram.allocated(), self.other.ram.allocated()), before)
        return comparison

    def test_holes_are_equal(self):
        comparison = self.compare()
        self.assertTrue(comparison.identical)
        self.assertEqual(comparison.bytes_read, 0)

    def test_a_hole_equals_zeroes(self):
        os.pwrite(self.one.fd, bytes(2 * MIB), 3 * PAGE_SIZE)
        comparison = self.compare()
        self.assertTrue(comparison.identical)
        self.assertEqual(comparison.bytes_nonzero, 0)
        self.assertGreaterEqual(comparison.bytes_read, 2 * MIB)

    def test_data_against_a_hole_differs_on_either_side(self):
        for memfd in (self.one, self.other):
            with self.subTest():
                os.pwrite(memfd.fd, b'\1', 7 * PAGE_SIZE + 5)
                comparison = self.compare()
                self.assertEqual(comparison.differing_pages, 1)
                self.assertEqual(comparison.first_difference, 7 * PAGE_SIZE)
                os.pwrite(memfd.fd, b'\0', 7 * PAGE_SIZE + 5)

    def test_last_byte(self):
        for memfd, value in ((self.one, b'\1'), (self.other, b'\2')):
            os.pwrite(memfd.fd, value, self.SIZE - 1)
        comparison = self.compare()
        self.assertEqual(comparison.differing_pages, 1)
        self.assertEqual(comparison.first_difference, self.SIZE - PAGE_SIZE)

    def test_same_data(self):
        for memfd in (self.one, self.other):
            content.write_data(memfd.ram, 4 * MIB)
        comparison = self.compare()
        self.assertTrue(comparison.identical)
        self.assertGreater(comparison.bytes_nonzero, 3 * MIB)

    def test_anonymous_against_file(self):
        size = self.SIZE + 3 * PAGE_SIZE
        area, anonymous = anonymous_ram(self, size)
        memfd = Memfd(self, size)
        for ram in (anonymous, memfd.ram):
            content.write_data(ram, 4 * MIB)
        self.assertTrue(content.compare(anonymous, memfd.ram).identical)
        area[PAGE_SIZE] = 1
        comparison = content.compare(anonymous, memfd.ram)
        self.assertEqual(comparison.differing_pages, 1)
        self.assertEqual(comparison.first_difference, PAGE_SIZE)

    def test_sizes_must_agree(self):
        with self.assertRaises(ValueError):
            content.compare(self.one.ram, Memfd(self, 1 * MIB).ram)


class Machine(unittest.TestCase):
    def test_available_is_part_of_total(self):
        self.assertGreater(memory.available(), 0)
        self.assertLessEqual(memory.available(), memory.total())

    def headroom(self, version_2: bool, **files: str):
        """Of a cgroup with these files."""
        with tempfile.TemporaryDirectory() as directory:
            for name, text in files.items():
                with open(f'{directory}/memory.{name}', 'w', encoding='ascii') as file:
                    file.write(text)
            return memory.cgroup_headroom(directory, version_2)

    def test_headroom_in_cgroup(self):
        stat = 'anon 1\ninactive_file 30\nactive_file 20\n'
        self.assertEqual(self.headroom(True, max='100\n', current='60\n',
                                       stat=stat), 90)
        self.assertIsNone(self.headroom(True, max='max\n', current='60\n', stat=stat))
        self.assertIsNone(self.headroom(True))
        stat = 'inactive_file 7\ntotal_inactive_file 30\ntotal_active_file 0\n'
        self.assertEqual(self.headroom(False, limit_in_bytes='100',
                                       usage_in_bytes='60', stat=stat), 70)
        self.assertIsNone(self.headroom(
            False, limit_in_bytes='9223372036854771712', usage_in_bytes='60',
            stat=stat))

    def test_cgroup_limits_what_is_available(self):
        with mock.patch.object(memory, '_own_cgroups', lambda: (True, 'abc')), \
             mock.patch.object(memory, 'cgroup_headroom',
                               lambda each, _: {'b': 5, 'c': 9}.get(each)):
            self.assertEqual(memory.available(), 5)

    def test_mappable(self):
        self.assertIsNone(memory.check_mappable(64 * MIB))
        self.assertIsNotNone(memory.check_mappable(1 << 62))


class Survivable(unittest.TestCase):
    def test_fits(self):
        self.assertEqual(memory.survivable(4 * GIB, 16 * GIB, 1 * GIB), 4 * GIB)

    def test_is_halved_until_both_sides_fit(self):
        self.assertEqual(memory.survivable(4 * GIB, 9 * GIB - 1, 1 * GIB), 2 * GIB)
        self.assertEqual(memory.survivable(4 * GIB, 0, 0), memory.SMALLEST)


class Judge(unittest.TestCase):
    def judge(self, **results) -> int:
        return demo.judge(results)

    def test_bound_is_what_the_guest_had_and_the_allowance(self):
        bound = 64 * MIB + 16 * MIB
        self.assertEqual(self.judge(patched=result(5, 5 + bound)), 0)
        self.assertEqual(self.judge(patched=result(5, 5 + bound + 1)), 1)

    def test_stock_may_grow(self):
        self.assertEqual(self.judge(stock=result(0, 1 * GIB)), 0)

    def test_different_ram_is_never_right(self):
        for name in ('patched', 'stock'):
            self.assertEqual(self.judge(**{name: result(0, 0, differing=1)}), 1)


def pressure(outcome) -> Pressure:
    """outcome: a result, or None if the destination was killed"""
    return Pressure(MigrateConfig('a', 1 * GIB), 320 * MIB,
                    90 * MIB if outcome else None, outcome)


class JudgePressure(unittest.TestCase):
    def judge(self, **outcomes) -> int:
        return demo.judge_pressure({name: pressure(outcome) for name, outcome
                                    in outcomes.items()})

    def test_only_stock_may_be_killed(self):
        self.assertEqual(self.judge(patched=result(0, 0), stock=None), 0)
        self.assertEqual(self.judge(patched=None, stock=None), 1)

    def test_different_ram_is_never_right(self):
        self.assertEqual(self.judge(patched=result(0, 0, differing=1)), 1)

    def test_not_to_be_had(self):
        self.assertEqual(self.judge(), 0)

    def test_table(self):
        table = report.pressure_table({
            'patched': pressure(result(0, 0)), 'stock': pressure(None)})
        self.assertRegex(table, 'patched +1 GiB +320 +90 +has all +yes')
        self.assertRegex(table, 'stock +1 GiB +320 +none +killed by the kernel +n/a')


class Report(unittest.TestCase):
    def test_table(self):
        self.assertEqual(
            report.rst_table(('a', 'long'), [('xyz', '1'), ('x', '2')]),
            '===  ====\n'
            'a    long\n'
            '===  ====\n'
            'xyz  1\n'
            'x    2\n'
            '===  ====')

    def test_results(self):
        results = {'stock': result(0, 1 * GIB, differing=1)}
        table = report.results_table(results)
        self.assertIn('0 -> 1024', table)
        self.assertIn('64 -> 64', table)
        self.assertIn('NO', table)
        words = report.in_words(results).replace('\n', ' ')
        self.assertIn('1 GiB that had 64 MiB of data', words)
        self.assertIn('its destination grow by 1024 MiB', words)


class WatchdogTest(unittest.TestCase):
    @staticmethod
    def wait_for(condition) -> bool:
        deadline = time.monotonic() + 10
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        return condition()

    @staticmethod
    def much_grace():
        """Who is killed meanwhile is not killed because it took too long."""
        return mock.patch.object(migrate, '_CANCEL_GRACE', 60)

    def test_is_silent_while_all_is_well(self):
        killed = threading.Event()
        with Watchdog(killed.set, 100, 60, available=lambda: 100) as watchdog:
            time.sleep(0.1)
        self.assertIsNone(watchdog.tripped)
        self.assertFalse(killed.is_set())

    def test_asks_before_it_kills(self):
        killed = threading.Event()
        with self.much_grace(), \
             Watchdog(killed.set, 100, 60, available=lambda: 99) as watchdog:
            self.assertTrue(self.wait_for(lambda: watchdog.tripped))
            self.assertFalse(killed.is_set())
        self.assertIn('memory', watchdog.tripped)
        self.assertFalse(killed.is_set())

    def test_kills_when_memory_keeps_falling(self):
        killed = threading.Event()
        with self.much_grace(), Watchdog(killed.set, 100, 60, available=lambda: 49):
            self.assertTrue(killed.wait(20))

    def test_kills_when_nobody_cancels(self):
        killed = threading.Event()
        with Watchdog(killed.set, 100, 0.01, available=lambda: 1000) as dog:
            self.assertTrue(killed.wait(10))
        self.assertIn('seconds', dog.tripped)
