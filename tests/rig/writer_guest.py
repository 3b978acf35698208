# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of tests/qtest/migration/i386/sparse-writer.S, driven from Python.

It writes to pages in pseudo-random order, and remembers in a table how often:
so what each page has to hold can be told from outside as well.
"""

import os
import re
import struct
import time
from typing import Any, Dict, List, Tuple

from random_model import DATA, MIB, PAGE, ZERO, BlockModel, WrongResult
from sparseram.blocks import Block
from sparseram.guest import Qemu

_HEADER = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                       '../qtest/migration/i386/sparse-writer.h')

# In the guest's RAM; see sparse-writer.S
_TABLE = 0x10000
_WORDS = (0, 1364, 4092)
_LOW = 1 * MIB                  # code, table; and what a PC has there

# What it writes to, and what it leaves alone behind that
_BASE = 4 * MIB
_GAP = 2 * MIB

_FIRMWARE_SIZE = 64 << 10
_TURN = 200000                  # ticks of the time-stamp counter a page
_BATCH = 256                    # pages for each B that it says
_TIMEOUT = 50.0                 # seconds
_POLL = 0.005


def read_header(text: str) -> Tuple[bytes, Dict[str, int]]:
    """The code, and the addresses of its symbols."""
    code = bytes(int(byte, 16)
                 for byte in re.findall(r'0x([0-9a-f]{2})\b', text))
    symbols = {match[1]: int(match[2], 16) for match in
               re.finditer(r'#define SPARSE_WRITER_(\w+) 0x([0-9a-f]{8})\b',
                           text)}
    return code, symbols


def expected_word(page: int, generation: int) -> int:
    """As the guest computes it: zero in each fourth generation."""
    if generation % 4 == 0:
        return 0
    return (page * 0x9e3779b1) & 0xffffff00 | generation


class WriterGuest:
    """What a QEMU needs to run it, and what is known about its pages."""

    def __init__(self, seed: int, size: int, prefix: str):
        """
        size: of RAM, bytes
        prefix: of the names of its files
        """
        with open(_HEADER, encoding='ascii') as file:
            code, self._symbols = read_header(file.read())
        self._pages = (size - _BASE - _GAP) // PAGE
        self._serial = f'{prefix}-serial'
        firmware = f'{prefix}-firmware'
        self._write_firmware(firmware, bytearray(code), seed)
        self.arguments: List[str] = ['-bios', firmware, '-serial',
                                     f'file:{self._serial}']

    def _write_firmware(self, path: str, code: bytearray, seed: int) -> None:
        mask = (1 << (self._pages // 2).bit_length() - 1) - 1
        for name, value in (('BASE', _BASE), ('PAGES', self._pages),
                            ('FOCUS_MASK', mask), ('TURN', _TURN),
                            ('SEED', seed & 0x7fffffff)):
            at = self._symbols[name] - self._symbols['START']
            struct.pack_into('<I', code, at, value)
        with open(path, 'wb') as file:
            file.write(bytes(_FIRMWARE_SIZE - len(code)) + code)

    @staticmethod
    def clear_area(kinds: bytearray) -> None:
        """It takes pages that it has not written to for pages of zeroes."""
        for page in range(_BASE // PAGE, len(kinds)):
            if kinds[page] == DATA:
                kinds[page] = ZERO

    def _said(self) -> str:
        if not os.path.exists(self._serial):
            return ''
        with open(self._serial, encoding='ascii', errors='replace') as file:
            said = file.read()
        if 'X' in said:
            raise WrongResult('the guest has found a page that is wrong')
        return said

    def _wait_for(self, letter: str, count: int) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while self._said().count(letter) < count:
            if time.monotonic() > deadline:
                raise WrongResult(f'the guest has said {self._said()!r}, and '
                                  f'should have said {letter} {count} times')
            time.sleep(_POLL)

    def batches(self) -> int:
        """How many times it has written a few hundred pages."""
        return self._said().count('B')

    def wait_until_it_writes(self) -> None:
        """Another batch."""
        self._wait_for('B', self.batches() + 1)

    def check_itself(self, qemu: Qemu, qtest: Any) -> None:
        """Let it check all of its pages, and run on; it must be stopped."""
        qtest.write(self._symbols['VERIFY'], b'\1\0\0\0')
        qemu.qmp('cont')
        self._wait_for('V', 1)
        self.wait_until_it_writes()

    def apply(self, block: Block, model: BlockModel) -> None:
        """Put into the model what the guest has written, by its table."""
        table = block.read(_TABLE, self._pages)
        for page, generation in enumerate(table):
            if not generation:
                continue
            word = struct.pack('<I', expected_word(page, generation))
            for at in _WORDS:
                model.write(_BASE + page * PAGE + at, word)

    @staticmethod
    def allow(allowed: bytearray) -> None:
        """What it may populate besides what it writes to."""
        allowed[:_LOW // PAGE] = b'\1' * (_LOW // PAGE)

    @staticmethod
    def is_its_own(page: int) -> bool:
        """Whether nothing is known about the content of a page."""
        return page < _LOW // PAGE
