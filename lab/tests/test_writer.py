# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/guest/writer.py."""

import struct
import unittest

from lab import UserError
from lab.guest import writer


class Header(unittest.TestCase):
    """What the assembler and C evaluate."""

    def test_numbers(self) -> None:
        """Hexadecimal, decimal, and relative to another name."""
        self.assertEqual(
            writer.parse_header('#define SPARSE_WRITER_A 0x10\n'
                                '#define SPARSE_WRITER_B (SPARSE_WRITER_A + 8)\n'
                                '#ifndef SPARSE_WRITER_H\n'
                                '#define SPARSE_WRITER_C 7\n'),
            {'A': 16, 'B': 24, 'C': 7})


class Firmware(unittest.TestCase):
    """The guest as a file."""

    def setUp(self) -> None:
        try:
            self.program = writer.assemble()
        except UserError as error:
            self.skipTest(str(error))

    def test_code(self) -> None:
        """It begins with a jump, and has its reset vector at the end."""
        self.assertEqual(self.program.code[:1], b'\xeb')
        self.assertEqual(self.program.code[-16:-15], b'\xeb')

    def test_parameters(self) -> None:
        """They are where the guest looks for them."""
        rom = writer.firmware(BASE=0x123000, SEED=0xfedcba98)
        plain = writer.firmware()
        self.assertEqual(len(rom), 64 << 10)
        start = len(rom) - len(self.program.code)
        for name, value in (('BASE', 0x123000), ('SEED', 0xfedcba98)):
            at = (start + self.program.addresses[name] - self.program.addresses['LOAD'])
            self.assertEqual(struct.unpack_from('<I', rom, at), (value,))
            rom = rom[:at] + plain[at:at + 4] + rom[at + 4:]
        self.assertEqual(rom, plain)


class Words(unittest.TestCase):
    """What the guest writes; that it is that, random migrations check."""

    def test_zero_page(self) -> None:
        """Each fourth write."""
        for page in (0, 1, 77, 30000):
            for sequence in range(1, 64):
                words = [word for _, word in writer.expected_words(page, sequence)]
                self.assertEqual(any(words), sequence % 4 != 0)
                self.assertLess(max(words), 1 << 32)

    def test_page(self) -> None:
        """The number of the write comes first, the checksum last."""
        words = dict(writer.expected_words(3, 5))
        self.assertEqual(words[0], 5)
        self.assertEqual(words[512], (5 + 3 * 0x9e3779b1 + 1) % (1 << 32))
        self.assertEqual(len(words), 9)
        self.assertEqual(max(words), 4092)

    def test_unfinished(self) -> None:
        """A guest that was stopped anywhere in a page; others stay."""
        old, new = (writer.expected_words(3, sequence) for sequence in (5, 9))
        for count in range(len(new) + 1):
            page = bytearray(4096)
            for offset, word in [*old, *new[:count]]:
                struct.pack_into('<I', page, offset, word)
            self.assertEqual(writer.unfinished_words(3, 9, page), new[:count])

    def test_table(self) -> None:
        """32-bit numbers."""
        self.assertEqual(writer.parse_table(b'\1\0\0\0\0\1\0\0'), [1, 256])
