# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/fuzz.py, and of what else reads its streams.

Those that need a QEMU take that of $QEMU, or of build/BASE/patched; the source
tree that analyze-migration.py is in is that of $QEMU_SRC, or
build/BASE/patched-src.
"""

import argparse
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import unittest

from lab import fuzz
from lab.base import BUILD
from lab.stream import (MEM_SIZE, MULTIFD_FLUSH, PAGE, RAM_HEADER,
                        SECTION_FOOTER, SECTION_PART, SECTION_START, StreamError)

QEMU = os.environ.get('QEMU', f'{BUILD}/patched/qemu-system-x86_64')
ANALYZE = os.path.abspath(os.path.join(
    os.environ.get('QEMU_SRC', f'{BUILD}/patched-src'),
    'scripts/analyze-migration.py'))

NAME = bytes([len(fuzz.BLOCK)]) + fuzz.BLOCK
SECTION = struct.pack('>I', 2)
FOOTER = bytes([SECTION_FOOTER]) + SECTION


def u64(value: int) -> bytes:
    return struct.pack('>Q', value)


END = u64(fuzz.EOS)


def run_of(offset: int, pages: int, name: bytes = NAME) -> bytes:
    return u64(offset | fuzz.ZERO) + name + b'\1' + u64(pages)


def data(offset: int, name: bytes = NAME) -> bytes:
    return u64(offset | fuzz.DATA) + name + b'\xa5' * PAGE


def stream(*records: bytes) -> bytes:
    """A stream with these records in a section of their own."""
    sizes = u64(fuzz.RAM_SIZE | MEM_SIZE) + NAME + u64(fuzz.RAM_SIZE)
    return (b'QEVM' + bytes([SECTION_START]) + SECTION + RAM_HEADER +
            sizes + END + FOOTER +
            bytes([SECTION_PART]) + SECTION + b''.join(records) + END +
            FOOTER)


class Parsing(unittest.TestCase):
    def test_records(self):
        records = [
            data(0), run_of(PAGE, 7), u64(PAGE | fuzz.ZERO) + NAME + b'\0',
            u64(PAGE | fuzz.ZERO | fuzz.CONTINUE) + b'\0',
            u64(fuzz.XBZRLE) + NAME + b'\1\0\3abc', u64(MULTIFD_FLUSH)]
        parsed = fuzz.Stream(stream(*records))
        self.assertEqual(parsed.records, records + [END])
        self.assertTrue(stream(*records).startswith(parsed.head))
        self.assertTrue(parsed.head.endswith(bytes([SECTION_PART]) + SECTION))

    def test_no_ram(self):
        with self.assertRaisesRegex(StreamError, 'no section of RAM'):
            fuzz.Stream(b'QEVM')

    def test_unknown_flags(self):
        with self.assertRaisesRegex(StreamError, 'unknown RAM flags'):
            fuzz.Stream(stream(u64(0x800)))


class Damage(unittest.TestCase):
    def setUp(self):
        self.parsed = fuzz.Stream(stream(data(0), run_of(PAGE, 7)))

    def streams(self, seed: int) -> list:
        rng = random.Random(seed)
        return [fuzz.damage(rng, self.parsed) for _ in range(200)]

    def test_depends_on_seed_only(self):
        self.assertEqual(self.streams(1), self.streams(1))
        self.assertNotEqual(self.streams(1), self.streams(2))

    def test_head_is_kept(self):
        whole = self.parsed.head + b''.join(self.parsed.records)
        damaged = self.streams(3)
        for each in damaged:
            self.assertTrue(each.startswith(self.parsed.head))
        self.assertGreater(sum(each != whole for each in damaged), 150)


class Errors(unittest.TestCase):
    def test_no_qemu(self):
        with self.assertRaisesRegex(fuzz.UserError, "there is no /nonexistent"):
            fuzz.run(argparse.Namespace(qemu='/nonexistent'))


@unittest.skipUnless(os.access(QEMU, os.X_OK),
                     f"there is no {os.path.basename(QEMU)}: run 'make qemu'")
class WithQemu(unittest.TestCase):
    def setUp(self):
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.directory, 'captured')

    def test_capture(self):
        """A captured stream has runs, and only with the capability."""
        for sparse in (True, False):
            parsed = fuzz.capture(QEMU, self.directory, sparse)
            runs = [each for each in parsed.records
                    if each[7] & fuzz.ZERO and each[-9] == 1]
            self.assertEqual(bool(runs), sparse)
            self.assertLess(len(parsed.records), 100 if sparse else 5000)

    def test_check(self):
        """A whole stream is accepted, one that is cut is refused."""
        fuzz.capture(QEMU, self.directory, True)
        self.assertEqual(fuzz.check(QEMU, self.path, True), '')
        os.truncate(self.path, os.path.getsize(self.path) // 2)
        self.assertEqual(fuzz.check(QEMU, self.path, True), '')

    def test_finding(self):
        """A QEMU that ends with another status is a finding."""
        wrong = os.path.join(self.directory, 'wrong')
        for command, said in (('exit 3', 'status 3'),
                              ('kill -SEGV $$', 'SIGSEGV'),
                              ('exit 1', 'without a message')):
            with open(wrong, 'w', encoding='ascii') as file:
                file.write(f'#!/bin/sh\n{command}\n')
            os.chmod(wrong, 0o755)
            self.assertIn(said, fuzz.check(wrong, '/dev/null', True))

    def extract(self) -> bytes:
        """What analyze-migration.py takes for the guest's RAM."""
        if not os.path.exists(ANALYZE):
            self.skipTest('there is no patched analyze-migration.py: '
                          "run 'make qemu'")
        subprocess.run([sys.executable, ANALYZE, '-x', '-f', self.path],
                       cwd=self.directory, check=True,
                       stdout=subprocess.DEVNULL)
        with open(os.path.join(self.directory, fuzz.BLOCK.decode()), 'rb') as file:
            return file.read()

    def test_analyze(self):
        fuzz.capture(QEMU, self.directory, True)
        ram = self.extract()
        self.assertEqual(len(ram), fuzz.RAM_SIZE)
        pages = {i for i in range(fuzz.RAM_SIZE // PAGE)
                 if ram[i * PAGE:(i + 1) * PAGE] != bytes(PAGE)}
        self.assertEqual(pages, {0, 1, 5, 100, 101, 102, 2000,
                                 fuzz.RAM_SIZE // PAGE - 1})

    def test_analyze_state(self):
        fuzz.capture(QEMU, self.directory, True)
        if not os.path.exists(ANALYZE):
            self.skipTest('there is no patched analyze-migration.py: '
                          "run 'make qemu'")
        text = subprocess.run(
            [sys.executable, ANALYZE, '-f', self.path], check=True,
            stdout=subprocess.PIPE, encoding='utf-8').stdout
        self.assertTrue(re.search(r'"mem0": "0x0*1000000"', text), text)

    def test_analyze_zero_after_data(self):
        """A run that comes after data of the same pages is zero in the end."""
        parsed = fuzz.capture(QEMU, self.directory, True)
        with open(self.path, 'rb') as file:
            captured = file.read()
        rest = captured[len(parsed.head):]
        with open(self.path, 'wb') as file:
            file.write(parsed.head + data(0x10000) + data(0x20000) +
                       run_of(0x10000, 1) + run_of(0x1f000, 3) + rest)
        self.assertEqual(self.extract()[0x10000:0x23000], bytes(0x13000))
