# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the comparison of streams, and of patterns in guest RAM."""

import struct
import unittest
import zlib

from lab import content
from lab.memory import MIB, PAGE_SIZE
from lab.ram import merge_extents
from lab.stream import (CONTINUE, DATA, EOS, MEM_SIZE, MULTIFD_FLUSH, PAGE,
                        RAM_HEADER, ZERO, Stream, StreamError, difference,
                        first_difference, multifd_difference, multifd_pages,
                        without_empty_sections)
from lab.tests import Memfd

SECTION = struct.pack('>I', 2)
NAME = b'\x04mem0'
COMMAND = b'\x08' + struct.pack('>HH', 11, 0)


def u64(value: int) -> bytes:
    return struct.pack('>Q', value)


def section(kind: int, *records: bytes) -> bytes:
    return (bytes([kind]) + SECTION + b''.join(records) + u64(EOS) + b'\x7e' + SECTION)


def page(flags: int, number: int, body: bytes, name: bytes = NAME) -> bytes:
    """A record with a name; without, if that is empty."""
    return (u64(number * PAGE | flags | (0 if name else CONTINUE)) + name + body)


ONE, TWO = b'\x11' * PAGE, b'\x22' * PAGE


class Difference(unittest.TestCase):
    head = (b'QEVM' + b'\x01' + SECTION + RAM_HEADER +
            u64(MIB | MEM_SIZE) + NAME + u64(MIB) + u64(EOS) + b'\x7e' +
            SECTION)
    tail = b'\x04devices'

    def stream(self, *sections: bytes) -> Stream:
        return Stream(self.head + b''.join(sections) + self.tail)

    def setUp(self) -> None:
        self.one = self.stream(
            section(2, page(DATA, 0, ONE), page(ZERO, 1, b'\0', b'')),
            section(3, page(DATA, 2, TWO)))

    def test_boundaries(self):
        """Where a section ends, and a flush is, makes no difference."""
        other = self.stream(
            section(2, page(DATA, 0, ONE)), section(2, u64(MULTIFD_FLUSH)),
            section(3, page(ZERO, 1, b'\0'), page(DATA, 2, TWO, b'')))
        self.assertIsNone(difference(self.one, other))

    def test_command(self):
        """One between two sections is compared, wherever it is."""
        sections = (section(2, page(DATA, 0, ONE), page(ZERO, 1, b'\0', b'')),
                    section(3, page(DATA, 2, TWO)))
        other = self.stream(sections[0], COMMAND, sections[1])
        self.assertEqual(other.tail, self.tail)
        self.assertIn('commands', difference(self.one, other))
        self.assertIsNone(difference(other, self.stream(*sections, COMMAND)))

    def test_record(self):
        for record, said in ((page(ZERO, 2, b'\0'), 'zero page at 0x2000'),
                             (page(ZERO, 2, b'\1' + u64(3)), '3 zero pages'),
                             (page(DATA, 2, ONE), 'with other bytes'),
                             (page(DATA, 3, TWO), 'data at 0x3000 of mem0')):
            other = self.stream(
                section(2, page(DATA, 0, ONE), page(ZERO, 1, b'\0', b'')),
                section(3, record))
            with self.subTest(said):
                self.assertIn(said, difference(self.one, other))

    def test_missing(self):
        other = self.stream(section(2, page(DATA, 0, ONE), page(ZERO, 1, b'\0', b'')))
        self.assertEqual(difference(self.one, other), '3 and 2 records')

    def test_every_byte(self):
        """None can be changed without a difference."""
        data = bytearray(self.head + section(2, page(DATA, 0, ONE)) + self.tail)
        one = Stream(bytes(data))
        # The type and the end of a section do not count, as long as there is
        # a section
        page_at = len(self.head) + 5
        for at in (*range(len(self.head) - 14), *range(page_at, page_at + 50),
                   *range(len(data) - len(self.tail), len(data))):
            data[at] ^= 0x40
            try:
                self.assertIsNotNone(difference(one, Stream(bytes(data))), at)
            except (StreamError, struct.error, IndexError):
                pass
            data[at] ^= 0x40

    def test_first_difference(self):
        data = bytes(range(256)) * 3
        self.assertIsNone(first_difference(data, data))
        for at in (0, 1, 500, len(data) - 1):
            other = bytearray(data)
            other[at] ^= 1
            self.assertEqual(first_difference(data, bytes(other)), at)
        self.assertEqual(first_difference(data, data[:99]), 99)

    def test_empty_sections(self):
        one = b'head' + section(2) + section(2, u64(MULTIFD_FLUSH)) + b'tail'
        self.assertEqual(without_empty_sections(one), b'headtail')
        full = section(2, page(DATA, 0, ONE))
        self.assertEqual(without_empty_sections(full), full)


def packet(flags: int, normal: list, zero: list, data: bytes) -> bytes:
    offsets = [*normal, *zero]
    offsets += [0] * (128 - len(offsets))
    return (struct.pack('>IIIIIIQI28x256s', 0x11223344, 1, flags, 128,
                        len(normal), len(data), 0, len(zero), b'mem0') +
            struct.pack('>128Q', *offsets) + data)


INIT = struct.pack('>II16sB39x', 0x11223344, 1, b'', 0)


class Multifd(unittest.TestCase):
    one = INIT + packet(0, [0, PAGE], [0x8000], ONE + TWO) + packet(1, [], [], b'')

    def test_pages(self):
        self.assertEqual(multifd_pages(self.one), {
            (b'mem0', 0): ONE, (b'mem0', PAGE): TWO, (b'mem0', 0x8000): b''})

    def test_packets(self):
        """How pages are put into packets makes no difference."""
        other = (INIT + packet(0, [PAGE], [0x8000], TWO) + packet(0, [0], [], ONE))
        self.assertIsNone(multifd_difference(self.one, other))

    def test_zlib(self):
        stream = zlib.compressobj()
        parts = [stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)
                 for data in (TWO, ONE)]
        other = (INIT + packet(2, [PAGE], [0x8000], parts[0]) +
                 packet(2, [0], [], parts[1]))
        self.assertIsNone(multifd_difference(self.one, other))

    def test_differs(self):
        for other in (packet(0, [0, PAGE], [0x8000], TWO + ONE),
                      packet(0, [0, PAGE], [], ONE + TWO),
                      packet(0, [0, PAGE, 0x8000], [], ONE + TWO + bytes(PAGE))):
            self.assertIn('of mem0', multifd_difference(self.one, INIT + other))

    def test_twice(self):
        with self.assertRaisesRegex(StreamError, 'twice'):
            multifd_pages(self.one + packet(0, [], [PAGE], b''))


class Pattern(unittest.TestCase):
    size = 4 * MIB

    def test_layout(self):
        """Runs follow each other, and there is some of everything."""
        for seed in range(20):
            at, kinds = 0, set()
            for kind, start, end in content.layout(self.size, seed):
                self.assertEqual(start, at)
                kinds.add(kind)
                at = end
            self.assertEqual(at, self.size)
            self.assertEqual(kinds, {content.DATA, content.ZERO, content.HOLE})

    def test_write(self):
        one, other = (Memfd(self, self.size).ram for _ in range(2))
        for ram in one, other:
            content.write(ram, 3)
        self.assertTrue(content.compare(one, other).identical)
        wanted = {kind: [] for kind in (content.DATA, content.ZERO, content.HOLE)}
        for kind, start, end in content.layout(self.size, 3):
            wanted[kind].append((start, end))
        self.assertEqual(content.nonzero(one), wanted[content.DATA])
        self.assertEqual(
            list(one.extents()),
            merge_extents(wanted[content.DATA], wanted[content.ZERO]))

    def test_another_seed(self):
        one, other = (Memfd(self, self.size).ram for _ in range(2))
        content.write(one, 3)
        content.write(other, 4)
        self.assertFalse(content.compare(one, other).identical)

    def test_round_out(self):
        self.assertEqual(
            content.round_out([(PAGE_SIZE, 2 * PAGE_SIZE), (3 * MIB, 4 * MIB)],
                              2 * MIB), [(0, 4 * MIB)])
        self.assertEqual(content.total([(0, 5), (7, 9)]), 7)
