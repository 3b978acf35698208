# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/bench.py and what it stands on that need no QEMU."""

import argparse
import contextlib
import errno
import io
import json
import mmap
import os
import sys
import socket
import tempfile
import threading
import time
import unittest
from dataclasses import replace
from unittest import mock

from lab import bench, content, memory
from lab.measure import operation, ping, report, rows, summary
from lab.measure.operation import Growth, Measurement, Times
from lab.measure.rows import AtMost, HolesAreRight, PairedRatioAtMost, RatioAtMost
from lab.measure.summary import RowResult
from lab.memory import GIB, MIB, PAGE_SIZE
from lab.migrate import MigrationFailed
from lab.qemu import Guest, GuestError
from lab.ram import KINDS, Sample, reset_rss_peak, sample
from lab.tests import Memfd, mapped_ram


def measurement(total=1.0, source=0, destination=0, holes=None, expected=5,
                differing=0, downtime=0.1) -> Measurement:
    """destination: growth of its RAM in bytes, or None for no such guest."""
    return Measurement(
        version='10.0.13', times=Times(total, total, ram={'duplicate': 5},
                                       downtime=downtime),
        source=Growth(source, 4096, 0.5, 2 * MIB, 0.002),
        destination=(None if destination is None
                     else Growth(destination, 8192, 0.25, 3 * MIB, 0.25)),
        expected_holes=expected, holes=holes, differing_pages=differing)


def row(*targets, **more) -> rows.Row:
    return rows.Row('name', 'what', operation.Migrate(),
                    *rows.stock_and_patched('memfd'), targets=targets, **more)


def result(stock, patched, *targets) -> RowResult:
    """stock, patched: lists of measurements"""
    return RowResult(row(*targets), 1 * GIB, 1 * GIB,
                     {'stock': stock, 'patched': patched})


class HalveUntil(unittest.TestCase):
    def test_halves(self):
        for largest, size in ((3 * GIB, 2 * GIB), (9 * GIB, 8 * GIB),
                              (0, memory.SMALLEST)):
            self.assertEqual(memory.halve_until(
                8 * GIB, lambda each, most=largest: each <= most), size)


class Fill(unittest.TestCase):
    # Not a multiple of what is written at once
    SIZE = 37 * MIB

    def setUp(self):
        self.ram = Memfd(self, self.SIZE)
        self.pages = self.SIZE // PAGE_SIZE

    def test_every_page(self):
        self.assertEqual(content.fill(self.ram.ram), self.SIZE)
        self.assertEqual(self.ram.ram.allocated(), self.SIZE)
        self.assertEqual(os.fstat(self.ram.fd).st_size, self.SIZE)
        contents = {self.ram.page(number) for number in range(self.pages)}
        self.assertEqual(len(contents), self.pages)
        self.assertNotIn(bytes(PAGE_SIZE), contents)

    def test_every_second_page(self):
        self.assertEqual(content.fill(self.ram.ram, 2), self.SIZE // 2)
        for number in range(self.pages):
            self.assertEqual(self.ram.page(number) == bytes(PAGE_SIZE),
                             bool(number % 2))
        if self.ram.ram.allocated() != self.SIZE // 2:
            self.skipTest('shmem huge pages: every second page fills all')
        self.assertEqual(operation.count_holes(self.ram.ram, 'memfd'), self.pages // 2)
        self.assertIsNone(operation.count_holes(self.ram.ram, 'memfd-private'))

    def test_what_cannot_be_written_is_an_error(self):
        for pwrite in ({'return_value': 0}, {'side_effect': OSError(
                errno.ENOSPC, 'No space left')}):
            with mock.patch.object(os, 'pwrite', **pwrite), self.assertRaises(OSError):
                content.fill(self.ram.ram)

    def test_a_file_that_only_a_mapping_can_write(self):
        # hugetlbfs
        with mock.patch.object(os, 'pwrite', side_effect=OSError(
                errno.EINVAL, 'Invalid argument')):
            self.assertEqual(content.fill(self.ram.ram), self.SIZE)
        other = Memfd(self, self.SIZE)
        content.fill(other.ram)
        self.assertTrue(content.compare(self.ram.ram, other.ram).identical)


class Scatter(unittest.TestCase):
    # More extents than are written at once, at a distance that is uneven
    DATA = 18 * MIB
    SIZE = 101 * MIB

    def test_same_data_as_full(self):
        full = Memfd(self, self.DATA)
        content.fill(full.ram)
        ram = Memfd(self, self.SIZE)
        self.assertEqual(content.scatter(ram.ram, self.DATA), self.DATA)
        extents = list(ram.ram.extents())
        pages = [page for page in
                 map(ram.page, range(self.SIZE // PAGE_SIZE))
                 if page != bytes(PAGE_SIZE)]
        self.assertEqual(pages, [full.page(number) for number
                                 in range(self.DATA // PAGE_SIZE)])
        self.assertEqual(os.fstat(ram.fd).st_size, self.SIZE)
        if ram.ram.allocated() != self.DATA:
            self.skipTest('shmem huge pages: more than the data is allocated')
        self.assertEqual({end - start for start, end in extents}, {content.EXTENT})

    def test_no_part_of_an_extent(self):
        ram = Memfd(self, self.SIZE)
        for amount in (0, PAGE_SIZE, self.SIZE + content.EXTENT):
            with self.assertRaises(ValueError):
                content.scatter(ram.ram, amount)


class Dirty(unittest.TestCase):
    def test_so_many_anywhere_but_in_rom(self):
        for percent, count in ((1, 161), (10, 1612), (50, 8064)):
            pages = operation.dirty_pages(64 * MIB, percent)
            self.assertEqual(len(pages), count)
            self.assertEqual(pages, sorted(set(pages)))
            self.assertGreaterEqual(pages[0], MIB // PAGE_SIZE)
            self.assertLess(pages[-1], 64 * MIB // PAGE_SIZE)
            self.assertEqual(pages, operation.dirty_pages(64 * MIB, percent))

    def test_what_cannot_be_written_is_a_failure(self):
        def serve(listener, answer):
            connection, _ = listener.accept()
            with listener, connection, connection.makefile('rwb') as file:
                said.append(file.readline())
                file.write(answer)

        def qmp(command, **arguments):
            if command == 'chardev-add':
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(arguments['backend']['data']['addr']['data']['path'])
                listener.listen()
                thread = threading.Thread(target=serve, args=(listener, answer))
                thread.start()
                self.addCleanup(thread.join)

        guest, said, answer = mock.Mock(), [], b'OK\n'
        guest.qmp = qmp
        operation.write_by_qtest(guest, [5])
        self.assertEqual(said, [b'write 0x5000 0x8 0xfffffffffffffffa\n'])
        for answer in (b'FAIL Unknown command\n', b''):
            with self.assertRaises(GuestError):
                operation.write_by_qtest(guest, [5])


class Events(unittest.TestCase):
    def test_when_it_got_into_each_state(self):
        guest = Guest.__new__(Guest)
        guest._vm = mock.Mock()
        guest._vm.get_qmp_events.return_value = [
            {'event': 'STOP', 'timestamp': {'seconds': 1, 'microseconds': 2}},
            {'event': 'MIGRATION', 'data': {'status': 'device'},
             'timestamp': {'seconds': 3, 'microseconds': 250000}},
            {'event': 'MIGRATION', 'data': {'status': 'completed'},
             'timestamp': {'seconds': 4, 'microseconds': 0}}]
        self.assertEqual(guest.migration_times(), {'device': 3.25, 'completed': 4})


class OwnFile(unittest.TestCase):
    def test_reserved_and_sparse(self):
        with tempfile.TemporaryDirectory() as directory:
            for backend, allocated in (('reserved', MIB), ('other-file', 0)):
                with contextlib.ExitStack() as stack:
                    name = operation.ram_file(stack, backend, MIB, directory)
                    status = os.stat(name)
                    self.assertEqual(status.st_size, MIB)
                    self.assertEqual(status.st_blocks * 512, allocated)
                self.assertFalse(os.path.exists(name))
            with contextlib.ExitStack() as stack:
                self.assertEqual(operation.ram_file(stack, 'memfd', MIB, directory), '')


class PrivateRam(unittest.TestCase):
    SIZE = 8 * MIB

    def setUp(self):
        self.file = Memfd(self, self.SIZE)
        self.area, self.ram = mapped_ram(self, self.file.fd, self.SIZE,
                                         mmap.MAP_PRIVATE)

    def test_counts_what_is_in_the_file_and_what_is_not(self):
        self.assertEqual(self.ram.allocated(), 0)
        os.pwrite(self.file.fd, b'file', 0)
        in_file = self.ram.allocated()
        self.assertGreaterEqual(in_file, PAGE_SIZE)
        # The rest of its page comes from the file, which allocates that
        self.area[5 * MIB] = 1
        self.assertGreaterEqual(self.ram.allocated(), in_file + PAGE_SIZE)

    def test_sees_both_kinds_of_data_and_allocates_nothing(self):
        os.pwrite(self.file.fd, b'file', 0)
        self.area[5 * MIB] = 1
        before = self.ram.allocated()
        extents = list(self.ram.extents())
        for offset in (0, 5 * MIB):
            self.assertTrue(any(start <= offset < end for start, end in extents))
        self.assertEqual(self.ram.allocated(), before)
        with self.ram.opened() as fd:
            self.assertEqual(os.pread(fd, 1, self.ram.base + 5 * MIB), b'\1')
        self.assertEqual(os.pread(self.file.fd, 1, 5 * MIB), b'\0')


class Ping(unittest.TestCase):
    """The longest silence of a monitor, which is a thread here."""

    def setUp(self):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(directory, 'monitor')
        self.listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listener.close)
        self.listener.bind(self.path)
        self.listener.listen()
        self.asked = []

    def be_monitor(self, serve):
        """Answer the greeting and the first command; serve(file) does the rest."""
        def run():
            connection, _ = self.listener.accept()
            with connection, connection.makefile('rwb') as file:
                file.write(b'{"QMP": {}}\n')
                self.answer(file)
                serve(file)

        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(thread.join)
        return thread

    def answer(self, file, seconds=0.0, events=b''):
        """Answer a command after so many seconds; whether there was one."""
        file.flush()
        line = file.readline()
        if line:
            self.asked.append(json.loads(line)['execute'])
            time.sleep(seconds)
            file.write(events + b'{"return": {}}\n')
            file.flush()
        return bool(line)

    def longest(self, delays, events=b''):
        """What is measured, if a monitor takes so many seconds for the pings."""
        def serve(file):
            for delay in delays:
                self.answer(file, delay, events)
            while self.answer(file):
                pass

        self.be_monitor(serve)
        with ping.Pinger(self.path) as pinger:
            while len(self.asked) < 1 + len(delays):
                time.sleep(0.01)
            early = pinger.longest
        return early, pinger.longest

    def test_longest_of_all(self):
        longest = self.longest((0, 0.2, 0))[1]
        self.assertGreaterEqual(longest, 0.2)
        self.assertLess(longest, 5)
        self.assertEqual(self.asked[:2], ['qmp_capabilities', 'query-status'])

    def test_what_is_under_way_counts(self):
        early, longest = self.longest((0, 0.5))
        self.assertLess(early, 0.5)
        self.assertGreaterEqual(longest, 0.5)

    def test_an_event_is_no_answer(self):
        self.assertGreaterEqual(self.longest((0.1, 0), b'{"event": "STOP"}\n')[1], 0.1)
        self.assertEqual(set(self.asked[1:]), {'query-status'})

    def test_a_guest_that_is_killed_is_no_error(self):
        thread = self.be_monitor(lambda file: file.readline())
        with ping.Pinger(self.path):
            thread.join()


class Process(unittest.TestCase):
    def test_cpu_time_is_finer_than_a_tick(self):
        before = operation.cpu_time(os.getpid())
        while operation.cpu_time(os.getpid()) == before:
            pass
        self.assertLess(operation.cpu_time(os.getpid()) - before, 0.005)

    def test_peak_starts_anew(self):
        def resident():
            return sample(os.getpid(), Memfd(self, 3 * MIB).ram)

        with mmap.mmap(-1, 32 * MIB) as area:
            area.write(bytes(32 * MIB))
        self.assertGreaterEqual(resident().rss_peak, resident().rss + 16 * MIB)
        reset_rss_peak(os.getpid())
        self.assertLess(resident().rss_peak, resident().rss + 16 * MIB)

    def test_growth_is_of_the_file_or_else_of_the_process(self):
        for allocated, now, growth in ((None, None, 7), (100, 103, 3)):
            before = Sample(allocated, 0, 0, 10, 0)
            after = replace(before, allocated=now, rss_anon=17)
            self.assertEqual(operation.ram_growth(before, after), growth)


class Rows(unittest.TestCase):
    def test_names_are_unique(self):
        names = [each.name for each in rows.ALL]
        self.assertEqual(len(set(names)), len(names))

    def test_each_is_consistent(self):
        for each in rows.ALL:
            with self.subTest(each.name):
                for variant in each.variants:
                    self.assertLessEqual(set(variant.backends), set(KINDS))
                    self.assertIn(variant.qemu, ('stock', 'patched'))
                self.assertEqual(
                    len({variant.label for variant in each.variants}),
                    len(each.variants))
                metrics = [target.metric for target in each.targets
                           if not isinstance(target, HolesAreRight)]
                self.assertLessEqual(set(metrics), set(summary.METRICS))
                self.assertTrue(each.operation.loads or not any(
                    metric.startswith('dest') for metric in metrics))
                # A smaller guest has a reason
                self.assertEqual(bool(each.largest), bool(each.why))

    def test_harmless_compares_stock_and_patched(self):
        for each in rows.HARMLESS:
            self.assertEqual([variant.qemu for variant in each.variants],
                             ['stock', 'patched'])
            self.assertEqual({target.limit for target in each.targets}, {1.02})
            self.assertEqual(replace(each.baseline, label='', qemu=''),
                             replace(each.subject, label='', qemu=''))
            # By default, what is left for the downtime is a matter of luck
            if not each.operation.mode.file:
                self.assertEqual(each.operation.mode.parameters['downtime-limit'], 0)

    def test_fast_has_a_goal(self):
        for each in rows.FAST:
            self.assertEqual([target.metric for target in each.targets
                              if isinstance(target, AtMost)
                              and target.metric == 'total_time'],
                             ['total_time'], each.name)
            self.assertTrue(each.subject.size, each.name)

    def test_groups_by_name(self):
        for name, group in (('harmless', rows.HARMLESS), ('fast', rows.FAST)):
            self.assertEqual(rows.select(rows.ALL, [name]),
                             [each for each in rows.ALL if each in group])
        self.assertIn('sparse-ram-1T', [each.name for each in rows.FAST])
        self.assertEqual(
            [each.name for each in rows.select(rows.ALL, ['sparse-ram'])],
            ['sparse-ram'])

    def test_quick_rows_are_small(self):
        for each in map(rows.shrunk, rows.FAST):
            if each not in rows.SPARSE_RAM:
                self.assertLessEqual(each.subject.size, 16 * GIB)
                self.assertGreaterEqual(each.subject.size, memory.SMALLEST)

    def test_the_source_never_fills_a_hole(self):
        for each in rows.GROWTH + rows.SPARSE_RAM:
            if each.name not in ('private', 'anonymous'):
                self.assertIn(rows.SOURCE_STAYS, each.targets, each.name)

    def test_select(self):
        def names(*patterns):
            return [each.name for each in rows.select(rows.GROWTH, patterns)]

        self.assertEqual(names('precopy'), ['precopy'])
        self.assertEqual(names('multifd*'),
                         ['multifd', 'multifd-legacy', 'multifd-none'])
        self.assertEqual(names('file', 'x*'), ['xbzrle', 'file'])
        self.assertEqual(names('nonsense'), [])
        self.assertEqual(len(names()), len(rows.GROWTH))


class Statistics(unittest.TestCase):
    def test_medians_and_ratios(self):
        measured = result([measurement(t) for t in (9, 1, 2)],
                          [measurement(t) for t in (1, 5, 3)])
        self.assertEqual(measured.median('stock', 'total_time'), 2)
        self.assertEqual(measured.median('patched', 'total_time'), 3)
        self.assertEqual(measured.ratio('total_time'), 1.5)
        self.assertEqual(measured.ratio('cpu_time'), 1)

    def test_spread_is_the_larger_one(self):
        measured = result([measurement(t) for t in (1, 1, 1)],
                          [measurement(t) for t in (8, 9, 10, 11, 12)])
        self.assertAlmostEqual(measured.spread('total_time'), 0.2)

    def test_metrics_of_both_sides(self):
        run = measurement()
        self.assertEqual([summary.METRICS[name].of(run) for name in (
            'downtime', 'source_cpu', 'destination_cpu', 'cpu_time',
            'source_silence', 'destination_silence')],
            [0.1, 0.5, 0.25, 0.75, 0.002, 0.25])

    def test_interval_of_a_median(self):
        # Of n values, the median is outside of all with 2 / 2 ** n
        self.assertEqual(summary.median_interval([3.0, 1.0, 2.0]), (1.0, 3.0, 0.75))
        self.assertEqual(summary.median_interval([7.0]), (7.0, 7.0, 0.0))
        # 1 - 2 * (1 + 11) / 2048; without two at each end it is 0.935
        low, high, confidence = summary.median_interval(
            [float(value) for value in range(11)])
        self.assertEqual((low, high), (1.0, 9.0))
        self.assertAlmostEqual(confidence, 0.98828, 4)

    def test_ratios_are_of_runs_in_turns(self):
        # A machine that becomes slower all the time: no change to a ratio
        measured = result([measurement(t) for t in (1, 2, 30)],
                          [measurement(t) for t in (1.1, 2, 30)])
        paired = measured.paired('total_time')
        self.assertEqual(paired.median, 1)
        self.assertEqual((paired.low, paired.high), (1, 1.1))
        self.assertEqual(paired.confidence, 0.75)

    def test_no_ratio_to_nothing(self):
        measured = result([measurement(downtime=0), measurement(),
                           measurement(downtime=None)],
                          [measurement(), measurement(downtime=0.2)])
        self.assertEqual(measured.paired('downtime').median, 2)
        self.assertIsNone(result([], []).paired('downtime'))
        self.assertIsNone(result([measurement(downtime=None)],
                                 [measurement()]).paired('downtime'))

    def test_what_there_is_not(self):
        measured = result([measurement(0)], [measurement(destination=None)])
        self.assertIsNone(measured.median('patched', 'destination_growth'))
        self.assertIsNone(measured.median('nobody', 'total_time'))
        self.assertIsNone(measured.ratio('total_time'))
        self.assertIsNone(measured.spread('total_time'))


class Judge(unittest.TestCase):
    def verdict(self, target, patched, stock=()):
        verdicts = summary.judge(result(list(stock), list(patched), target))
        self.assertEqual(len(verdicts), 1)
        return verdicts[0]

    def test_limits(self):
        most = AtMost('source_growth', 16 * MIB)
        less = AtMost('source_growth', 16 * MIB, strict=True)
        time_limit = AtMost('total_time', 0.030)
        ratio = RatioAtMost('total_time', 1.02)
        for target, patched, met in (
                (most, measurement(source=16 * MIB), True),
                (most, measurement(source=16 * MIB + 1), False),
                (less, measurement(source=16 * MIB - 1), True),
                (less, measurement(source=16 * MIB), False),
                (time_limit, measurement(0.030), True),
                (time_limit, measurement(0.0301), False),
                (ratio, measurement(1.02), True),
                (ratio, measurement(1.03), False)):
            with self.subTest(target=target, patched=patched):
                # Only the subject is judged
                verdict = self.verdict(target, [patched], [measurement(source=1 * GIB)])
                self.assertIs(verdict.met, met)
                self.assertEqual(verdict.word, 'met' if met else 'missed')

    def test_words(self):
        for target, words, measured in (
                (AtMost('source_growth', 16 * MIB), 'source growth <= 16 MiB',
                 '1.0 MiB'),
                (AtMost('total_time', 0.030), 'total time <= 0.03 s', '1.234 s'),
                (RatioAtMost('total_time', 1.02),
                 'total time, patched over stock <= 1.02', '1.234')):
            verdict = self.verdict(target, [measurement(1.234, source=MIB)],
                                   [measurement()])
            self.assertEqual((verdict.target, verdict.measured), (words, measured))

    def test_paired_ratio(self):
        target = PairedRatioAtMost('downtime', 1.02)
        stock = [measurement(downtime=0.1)] * 3
        for patched, word in (((0.1, 0.102, 0.2), 'met'),
                              ((0.09, 0.2, 0.2), 'undecided'),
                              ((0.103, 0.104, 0.2), 'missed'),
                              ((0.09,), 'undecided'), ((0.2,), 'undecided')):
            verdict = self.verdict(
                target, [measurement(downtime=each) for each in patched],
                stock)
            self.assertEqual(verdict.word, word, patched)
            self.assertEqual(verdict.target, 'downtime, patched over stock <= 1.02')
            if len(patched) == 3 and word == 'missed':
                self.assertEqual(verdict.measured, '1.040 (1.030 to 2.000, 75 %)')
        self.assertEqual(verdict.measured, '2.000 (of one pair)')

    def test_holes(self):
        target = HolesAreRight()
        for holes, met in ((5, True), (4, False), (6, False), (None, False),
                           (0, False)):
            verdict = self.verdict(target, [measurement(holes=5),
                                            measurement(holes=5),
                                            measurement(holes=holes)])
            self.assertIs(verdict.met, met, holes)
        self.assertTrue(self.verdict(target, [measurement(holes=0, expected=0)]).met)

    def test_not_measured_is_not_met(self):
        for target in (AtMost('source_growth', 1), HolesAreRight(),
                       RatioAtMost('total_time', 1),
                       PairedRatioAtMost('downtime', 1)):
            verdict = self.verdict(target, [])
            self.assertIsNone(verdict.met)
            self.assertEqual(verdict.word, 'not measured')


class Text(unittest.TestCase):
    def setUp(self):
        self.result = result([measurement(source=512 * MIB)],
                             [measurement(holes=4), measurement(holes=5)],
                             HolesAreRight())

    def check_table(self, text, lines):
        """Simple tables have no empty cell and three borders."""
        borders = [line for line in text.splitlines() if line[0] == '=']
        self.assertEqual(len(set(borders)), 1)
        self.assertEqual(len(borders), 3)
        self.assertEqual(len(text.splitlines()), lines + 4)

    def test_growth(self):
        table = summary.growth_table([self.result])
        self.check_table(table, 2)
        self.assertIn('512.0', table)
        self.assertIn('absent', table)
        self.assertIn('4 of 5', table)

    def test_speed(self):
        table = summary.speed_table([self.result])
        self.check_table(table, 1)
        self.assertIn('patched over stock', table)

    def test_harmless(self):
        table = summary.harmless_table([self.result])
        self.check_table(table, 1)
        self.assertIn('100.00 / 100.00', table)         # downtime, ms
        self.assertIn('0.0 / 512.0', table)             # growth, MiB
        self.assertIn('250.0 / 250.0', table)           # silence, ms

    def test_a_row_with_one_variant(self):
        single = RowResult(rows.Row('name', 'what', operation.Migrate(), None,
                                    rows.Variant('patched', 'patched'),
                                    targets=(AtMost('total_time', 2),)),
                           GIB, GIB, {'patched': [measurement()]})
        self.check_table(summary.growth_table([single]), 1)
        self.assertIsNone(single.ratio('total_time'))
        self.assertIsNone(single.paired('total_time'))
        self.assertEqual(summary.judge(single)[0].word, 'met')
        self.assertIsNone(summary.as_dict(single)['baseline'])

    def test_head(self):
        self.assertIn('commit', report.origin())
        self.assertRegex(report.origin(), r'\b20\d\d-\d\d-\d\d\b')
        self.assertNotIn('/', report.origin().partition('commit')[2])

    def test_a_variant_without_runs_leaves_no_cell_empty(self):
        empty = RowResult(row(), GIB, GIB, {'stock': [measurement()]})
        self.check_table(summary.growth_table([empty]), 2)
        self.check_table(summary.speed_table([empty]), 1)
        self.check_table(summary.harmless_table([empty]), 1)

    def test_targets(self):
        table = summary.targets_table(summary.judge(self.result))
        self.check_table(table, 1)
        self.assertIn('missed', table)
        self.assertIn('1 GiB', table)

    def test_notes(self):
        self.assertEqual(summary.notes([self.result]), [])
        smaller = RowResult(row(largest=1 * GIB, why='of the moon'), 1 * GIB, 8 * GIB)
        self.assertIn('1 GiB instead of 8 GiB, of the moon',
                      summary.notes([smaller])[0])
        smaller.size = 512 * MIB
        self.assertNotIn('moon', summary.notes([smaller])[0])
        skipped = RowResult(row(), GIB, GIB, skipped='no reason')
        self.assertEqual(summary.notes([skipped]), ['name: skipped, no reason.'])
        failed = RowResult(row(), GIB, GIB, failures={'stock': 'gone'})
        self.assertEqual(summary.notes([failed]), ['name: stock FAILED, gone'])

    def test_json(self):
        data = json.loads(json.dumps(summary.as_dict(self.result)))
        self.assertEqual(len(data['runs']['patched']), 2)
        self.assertEqual(data['runs']['stock'][0]['source']['ram'], 512 * MIB)
        self.assertIs(data['targets'][0]['met'], False)


class Limits(unittest.TestCase):
    LOTS = bench.Limits(memory=100 * GIB, disk=100 * GIB,
                        huge_pages=100 * GIB, shm=100 * GIB,
                        disk_is_memory=False)

    @staticmethod
    def row(name) -> rows.Row:
        return rows.select(rows.ALL, [name])[0]

    def test_what_fits(self):
        for name, less, fits in (
                ('precopy', {'memory': 2 * GIB}, True),
                ('precopy', {'memory': 2 * GIB - 1}, False),
                ('precopy', {'disk': 0, 'shm': 0}, True),
                ('file', {'disk': GIB}, False),
                ('file', {'disk': 2 * GIB}, True),
                ('file', {'memory': 2 * GIB}, True),
                ('file', {'memory': 2 * GIB, 'disk_is_memory': True}, False),
                ('shm-file', {'shm': 2 * GIB - 1}, False),
                ('hugetlb', {'huge_pages': 2 * GIB - 1}, False),
                ('hugetlb', {'huge_pages': 2 * GIB, 'memory': 0}, True),
                ('harmless-reserved-source', {'shm': 2 * GIB - 1}, False),
                ('harmless-disk-full', {'disk': 2 * GIB - 1}, False),
                ('harmless-disk-full', {'disk': 2 * GIB}, True)):
            with self.subTest(name=name, less=less):
                shortage = replace(self.LOTS, **less).shortage(self.row(name), GIB)
                self.assertEqual(shortage is None, fits)

    def test_huge_pages_of_shmem(self):
        row = self.row('harmless-thp-full')
        for unit, why in ((PAGE_SIZE, 'shmem_enabled'), (2 * MIB, None)):
            with mock.patch.object(bench.host, 'shmem_unit', lambda: unit):
                said = bench.why_not(row, self.LOTS, True)
                self.assertEqual(said and why in said, why and True)

    def test_why_not(self):
        def why_not(name, direct_io=True, **less):
            return bench.why_not(self.row(name), replace(self.LOTS, **less), direct_io)

        self.assertIsNone(why_not('precopy'))
        self.assertIn('nr_hugepages=2048', why_not('hugetlb', huge_pages=0))
        self.assertIn('O_DIRECT', why_not('mapped-ram-direct-io', False))
        self.assertIsNone(why_not('mapped-ram', False))
        self.assertIn('memory', why_not('precopy', memory=-5))
        self.assertIn('disk', why_not('file', disk=0))
        self.assertIn('/dev/shm', why_not('shm-file', shm=0))

    def test_this_machine(self):
        with tempfile.TemporaryDirectory() as directory:
            limits = bench.Limits.now(directory, 0)
            self.assertGreater(limits.memory, 0)
            self.assertGreaterEqual(limits.huge_pages, 0)
            self.assertNotEqual(bench.file_system(directory), 'unknown')
            self.assertIsInstance(bench.host.direct_io_works(directory), bool)
            self.assertEqual(os.listdir(directory), [])
        self.assertGreaterEqual(bench.busy_cpus(0.05), 0)


class Runs(unittest.TestCase):
    def setUp(self):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        self.order = []
        self.outcome = {}
        with mock.patch.object(sys, 'argv', [
                'bench', '--only', 'precopy', '--runs', '3', '--accel', 'tcg',
                '--directory', directory]):
            self.args = bench.parse_args()
        for name, value in (('measure', self.measure),
                            ('say', lambda _: None),
                            ('busy_cpus', lambda _: 0.0)):
            self.enterContext(mock.patch.object(bench, name, value))

    def measure(self, _, config):
        name = 'stock' if config.binary == self.args.stock else 'patched'
        self.order.append((name, config.verify))
        outcome = self.outcome.get(name, measurement())
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def run_bench(self) -> bench.Bench:
        each = bench.Bench(self.args)
        each.run()
        return each

    def test_in_turns_and_verified_once(self):
        done = self.run_bench()
        self.assertEqual(self.order, [
            ('stock', True), ('patched', True), ('patched', False),
            ('stock', False), ('stock', False), ('patched', False)])
        self.assertFalse(done.failed)
        self.assertEqual(len(done.results[0].runs['patched']), 3)

    def test_a_failure_is_kept_and_not_tried_again(self):
        self.outcome['stock'] = MigrationFailed('on purpose')
        done = self.run_bench()
        self.assertTrue(done.failed)
        self.assertEqual([name for name, _ in self.order].count('stock'), 1)
        self.assertEqual(len(done.results[0].runs['patched']), 3)
        self.assertIn('on purpose', summary.notes(done.results)[-1])

    def test_different_ram_is_a_failure(self):
        self.outcome['patched'] = measurement(differing=2)
        self.assertTrue(self.run_bench().failed)

    def test_saved_only_when_asked(self):
        with tempfile.TemporaryDirectory() as directory, \
             mock.patch.object(bench, 'RESULTS', directory), \
             contextlib.redirect_stdout(io.StringIO()):
            done = self.run_bench()
            bench.print_report(done)
            self.assertEqual(os.listdir(directory), [])
            self.args.only, self.args.save = ['harm*', 'fast'], True
            bench.print_report(done)
            self.assertEqual(os.listdir(directory), ['bench-harm-fast.rst'])
            with open(f'{directory}/bench-harm-fast.rst', encoding='utf-8') as file:
                text = file.read()
        self.assertIn('SPDX-License-Identifier: GPL-2.0-or-later', text)
        self.assertIn('Linux', text)
        self.assertIn('commit', text)
        self.assertNotIn(self.args.directory, text)

    def test_report_and_json(self):
        done = self.run_bench()
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            verdicts = bench.print_report(done)
        self.assertTrue(verdicts)
        self.assertIn('stock QEMU 10.0.13', out.getvalue())
        with open(self.args.json, encoding='utf-8') as file:
            data = json.load(file)
        self.assertTrue(data['complete'])
        self.assertEqual(data['qemu']['stock']['version'], '10.0.13')
        self.assertEqual(len(data['rows'][0]['runs']['stock']), 3)
        self.assertEqual(os.listdir(self.args.directory), ['bench-partial.json'])


class CommandLine(unittest.TestCase):
    @staticmethod
    def parse(*argv) -> argparse.Namespace:
        with mock.patch.object(sys, 'argv', ['bench', *argv]):
            return bench.parse_args()

    def test_defaults(self):
        args = self.parse()
        self.assertEqual((args.runs, args.speed_runs), (5, 11))
        self.assertEqual((args.size, args.full_size), (8 * GIB, 4 * GIB))
        self.assertEqual(os.path.basename(args.json), 'bench.json')

    def test_quick(self):
        args = self.parse('--quick')
        self.assertEqual((args.runs, args.speed_runs), (1, 1))
        self.assertLess(args.size, 1 * GIB)
        self.assertEqual(self.parse('--quick', '--size', '1G').size, 1 * GIB)

    def test_a_part_does_not_replace_the_whole(self):
        for argv in (('--quick',), ('--only', 'precopy')):
            self.assertEqual(os.path.basename(self.parse(*argv).json),
                             'bench-partial.json')

    def test_bad_numbers(self):
        for argv in (('--runs', '0'), ('--runs', 'x'), ('--size', '5')):
            with self.assertRaises(SystemExit), \
                 contextlib.redirect_stderr(io.StringIO()):
                self.parse(*argv)
