# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/faults, without any QEMU."""

import os
import socket
import tempfile
import threading
import time
import unittest
from unittest import mock


from lab.base import ROOT
from lab.faults import cases, failcalls, known, live, peek, proxy, verdict
from lab.faults.attempt import Ending
from lab.faults.cases import CLOSE, HALF, TO_DESTINATION, TO_SOURCE, Case, Cut
from lab.faults.proxy import Flow, Proxy
from lab.faults.sides import Layout, draw_layout
from lab.outcome import Wrong
from lab.memory import MIB, PAGE_SIZE


class Drawing(unittest.TestCase):
    def test_same_seed_same_case(self):
        for seed in range(200):
            self.assertEqual(cases.draw(seed), cases.draw(seed))
            self.assertEqual(live.draw(seed), live.draw(seed))

    def test_everything_is_drawn(self):
        drawn = [cases.draw(seed) for seed in range(4000)]
        self.assertEqual({case.fault for case in drawn}, set(cases.FAULTS) - {'held'})
        self.assertEqual({case.mode for case in drawn}, set(cases.MODES))
        self.assertEqual({case.source for case in drawn}, set(cases.BACKENDS))
        self.assertEqual({rule.call for case in drawn
                          for _, rule in case.rules}, set(failcalls.CALLS))
        self.assertEqual({(cut.how, cut.direction, cut.channel > 0)
                          for case in drawn for cut in case.cuts},
                         {(how, direction, other)
                          for how in (CLOSE, cases.RESET, HALF)
                          for direction in (TO_DESTINATION, TO_SOURCE)
                          for other in (False, True)})

    def test_every_errno_is_drawn(self):
        drawn = {(rule.call, rule.error) for seed in range(20000)
                 for _, rule in cases.draw(seed).rules}
        self.assertEqual(drawn, {(call, name) for call, names
                                 in cases.ERRNOS.items() for name in names})

    def test_what_passes_passes(self):
        for seed in range(4000):
            for _, rule in cases.draw(seed).rules:
                if cases.passes(rule.call, rule.error):
                    self.assertGreater(rule.count, 0)

    def test_faults_fit_the_mode(self):
        for seed in range(4000):
            case = cases.draw(seed)
            if case.fault == 'cut':
                self.assertFalse(case.how.file)
            if case.fault in ('pause', 'cut-recover'):
                self.assertTrue(case.how.postcopy)
            for cut in case.cuts:
                self.assertLess(cut.channel, case.how.channels)

    def test_filter(self):
        found = cases.drawn(0, faults=('cut',), modes=('multifd',))
        for _ in range(5):
            case = next(found)
            self.assertEqual((case.fault, case.mode), ('cut', 'multifd'))
            self.assertEqual(case, cases.draw(case.seed))

    def test_fixed_set_has_each_errno(self):
        fixed = cases.fixed()
        names = [name for name, _ in fixed]
        self.assertEqual(len(names), len(set(names)))
        fails = {(rule.call, rule.error) for _, case in fixed for _, rule in case.rules}
        for call in ('lseek', 'fallocate'):
            for name in cases.ERRNOS[call]:
                self.assertIn((call, name), fails)

    def test_errnos_have_numbers(self):
        for call, names in cases.ERRNOS.items():
            for name in names:
                self.assertTrue(os.strerror(failcalls.Rule(call, name).number))

    def test_describe(self):
        text = Case(7, 'precopy', 'cut', cuts=(
            Cut(0, TO_SOURCE, 5, CLOSE, True),)).describe()
        self.assertIn('seed=7 mode=precopy fault=cut', text)
        self.assertIn('after:5', text)
        self.assertNotIn('transport', text)

    def test_layout_does_not_overlap(self):
        layout = draw_layout(cases.random.Random(3), 64 * MIB, MIB, MIB)
        pages = [page for extents in (layout.data, layout.zeroes)
                 for start, end in extents
                 for page in range(start, end, PAGE_SIZE)]
        self.assertEqual(len(pages), len(set(pages)))
        self.assertEqual(len(pages), 2 * MIB // PAGE_SIZE)


class Control(unittest.TestCase):
    def test_size(self):
        packed = failcalls.pack([failcalls.Rule('pread', 'EIO')], 1, 2)
        self.assertEqual(len(packed), failcalls._SIZE)
        self.assertEqual(failcalls.counts(packed), [(0, 0)] * 8)

    def test_order_of_calls_is_that_of_the_library(self):
        with open(os.path.join(ROOT, 'lab/faults/fail-calls.c'),
                  encoding='utf-8') as file:
            text = file.read()
        body = text[text.index('enum Call {'):]
        body = body[:body.index('}')]
        self.assertEqual(
            [line.strip(' ,') for line in body.splitlines()[1:] if line],
            ['CALL_' + call.upper().replace('-', '_')
             for call in failcalls.CALLS])

    def test_too_many(self):
        with self.assertRaises(ValueError):
            failcalls.pack([failcalls.Rule('pread', 'EIO')] * 9, 0, 0)


class Flows(unittest.TestCase):
    def setUp(self):
        self.flow = Flow(None, None)

    def test_stops_in_order(self):
        self.flow.add_stop(10, None)
        self.flow.add_stop(3, None)
        self.assertEqual(self.flow.room(), 3)
        self.flow.passed = 3
        self.assertTrue(self.flow.is_due())
        self.flow.stops.pop(0)
        self.assertEqual(self.flow.room(), 7)

    def test_held(self):
        self.flow.held = True
        self.flow.add_stop(0, None)
        self.assertEqual(self.flow.room(), 0)
        self.assertFalse(self.flow.is_due())


class Channel(unittest.TestCase):
    """The proxy, with a destination that keeps what it gets."""

    def setUp(self):
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        path = os.path.join(self.directory, 'destination')
        self.listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listener.close)
        self.listener.bind(path)
        self.listener.listen()
        self.proxy = Proxy(f'unix:{path}', f'unix:{self.directory}/proxy')

    def connect(self):
        source = socket.socket(socket.AF_UNIX)
        source.connect(self.proxy.uri[len('unix:'):])
        source.settimeout(10)
        destination, _ = self.listener.accept()
        destination.settimeout(10)
        self.addCleanup(source.close)
        self.addCleanup(destination.close)
        return source, destination

    @staticmethod
    def all_of(sock):
        data = b''
        try:
            while True:
                part = sock.recv(65536)
                if not part:
                    return data
                data += part
        except ConnectionError:
            return data

    def test_cut_at_a_byte(self):
        self.proxy.cut(Cut(0, TO_DESTINATION, 1000, CLOSE, False))
        with self.proxy:
            source, destination = self.connect()
            source.sendall(bytes(5000))
            self.assertEqual(len(self.all_of(destination)), 1000)
            self.assertEqual(self.all_of(source), b'')
        self.assertEqual(len(self.proxy.cut_happened), 1)

    def test_half_close(self):
        self.proxy.cut(Cut(0, TO_DESTINATION, 10, HALF, False))
        with self.proxy:
            source, destination = self.connect()
            source.sendall(bytes(100000))
            self.assertEqual(len(self.all_of(destination)), 10)
            destination.sendall(b'still there')
            self.assertEqual(source.recv(100), b'still there')

    def test_other_channel_goes_on(self):
        self.proxy.cut(Cut(1, TO_DESTINATION, 0, CLOSE, False))
        with self.proxy:
            first = self.connect()
            second = self.connect()
            self.assertEqual(self.all_of(second[1]), b'')
            first[0].sendall(b'x')
            self.assertEqual(first[1].recv(10), b'x')

    def test_all_channels(self):
        self.proxy.cut(Cut(1, TO_DESTINATION, 0, CLOSE, True))
        with self.proxy:
            first = self.connect()
            self.connect()
            self.assertEqual(self.all_of(first[1]), b'')

    def test_hold_and_release(self):
        # It must not be released because this test had to wait
        patch = mock.patch.object(proxy, '_HOLD_SECONDS', 60)
        patch.start()
        self.addCleanup(patch.stop)
        self.proxy.hold_at('here', 4)
        with self.proxy:
            source, destination = self.connect()
            source.sendall(b'12345678')
            self.assertEqual(destination.recv(10), b'1234')
            while not self.proxy.reached('here'):
                time.sleep(0.001)
            destination.settimeout(0.2)
            with self.assertRaises(TimeoutError):
                destination.recv(10)
            self.proxy.release()
            destination.settimeout(10)
            self.assertEqual(destination.recv(10), b'5678')

    def test_action(self):
        done = threading.Event()
        self.proxy.do_at('now', 3, done.set)
        with self.proxy:
            source, _ = self.connect()
            source.sendall(b'12')
            self.assertFalse(done.wait(0.1))
            source.sendall(b'3')
            self.assertTrue(done.wait(10))

    def test_end_passes_through(self):
        with self.proxy:
            source, destination = self.connect()
            source.sendall(b'bye')
            source.close()
            self.assertEqual(self.all_of(destination), b'bye')


class Peeks(unittest.TestCase):
    class Memory:
        """What has to be there."""
        size = PAGE_SIZE

        def __init__(self, byte):
            self.byte = byte

        def read(self, _, length):
            return self.byte * length

    def peek(self, byte):
        buffer = peek.ctypes.create_string_buffer(b'a' * PAGE_SIZE)
        peeker = peek.Peeker(os.getpid(), peek.ctypes.addressof(buffer),
                             peek.Expected(self.Memory(byte)),
                             cases.random.Random(1), [0], writes=0)
        peeker.start()
        peeker.join(10)
        return peeker

    def test_right(self):
        peeker = self.peek(b'a')
        self.assertIsNone(peeker.wrong)
        self.assertEqual(peeker.done, 1)

    def test_wrong(self):
        self.assertIn('during postcopy', self.peek(b'b').wrong)


class Verdicts(unittest.TestCase):
    def test_warnings(self):
        log = ("qemu: warning: RAM block 'mem1': cannot find holes: x\n"
               "qemu: warning: RAM block 'mem1': cannot punch holes: x\n")
        self.assertEqual(verdict.warnings(log), {'mem1': 2})
        verdict.check_warnings(log, 'source', 2)
        with self.assertRaises(Wrong):
            verdict.check_warnings(log, 'source', 1)

    def test_must_complete(self):
        rules = (('source', failcalls.Rule('lseek', 'EINVAL')),)
        case = Case(0, 'precopy', 'calls', rules=rules)
        self.assertTrue(verdict.must_complete(case, Ending(), 0))
        case = Case(0, 'postcopy', 'calls', rules=rules)
        self.assertTrue(verdict.must_complete(case, Ending(), 0))
        case = Case(0, 'postcopy', 'calls', rules=(
            ('destination', failcalls.Rule('fallocate', 'EIO')),))
        self.assertIsNone(verdict.must_complete(case, Ending(), 0))
        case = Case(0, 'precopy', 'cut')
        self.assertTrue(verdict.must_complete(case, Ending(), 0))
        self.assertIsNone(verdict.must_complete(case, Ending(happened=True), 0))
        case = Case(0, 'precopy', 'tmpfs-full', limit=MIB)
        self.assertTrue(verdict.must_complete(case, Ending(), MIB // 2))
        self.assertIsNone(verdict.must_complete(case, Ending(), MIB))

    def test_known(self):
        lost = Ending('failed', 'postcopy-paused', happened=True)
        self.assertEqual(known.recognize(Case(0, 'postcopy', 'cut'), lost,
                                         None), known.POSTCOPY_END)
        self.assertEqual(known.recognize(Case(0, 'precopy', 'cut'), lost, None), '')
        self.assertEqual(known.recognize(
            Case(0, 'mapped-ram-multifd', 'truncate'), Ending(), -11),
            known.MAPPED_RAM_SHORT)
        self.assertEqual(known.recognize(
            Case(0, 'mapped-ram', 'truncate'), Ending(), -11), '')
        self.assertEqual(known.recognize(
            Case(0, 'mapped-ram-multifd', 'none'), Ending(), -11), '')

    def test_waits_for_channel(self):
        waiting = {'main': ['futex_do_wait'], 'mig/dst/recv_0': ['x']}
        self.assertTrue(known.waits_for_channel('destination', waiting, 2))
        self.assertFalse(known.waits_for_channel('destination', waiting, 1))
        self.assertFalse(known.waits_for_channel('destination', {'main': ['poll']}, 2))
        self.assertFalse(known.waits_for_channel('source', waiting, 2))
        self.assertTrue(known.waits_for_channel(
            'source', {'mig/src/main': ['futex_do_wait']}, 2))

    def test_old_data_that_cannot_be_freed(self):
        class Empty:
            """Nothing in it."""
            @staticmethod
            def units(_):
                return set()

        old = Layout(((0, PAGE_SIZE),), ())
        self.assertEqual(
            verdict.most_allocated(Empty(), 'memfd-private', {7}, old)
            - verdict.most_allocated(Empty(), 'memfd', set(), None),
            2 * PAGE_SIZE)
