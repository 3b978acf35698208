# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of lab/qtest/sparse-writer.S, driven from Python.

See lab/guest/writer.py.
"""

import struct
import time
from typing import Iterable, Tuple

from lab.guest import writer
from lab.memory import MIB
from lab.outcome import Wrong
from lab.qemu import Qemu
from lab.qtest_client import Qtest
from lab.ram import Ram
from lab.random.model import DATA, PAGE, ZERO, BlockModel

# Code and table, and what else a PC has there
_LOW = 2 * MIB
_TABLE_START = 1 * MIB

# What it writes to, and what it leaves alone behind that
_BASE = 4 * MIB
_GAP = 2 * MIB

_TURN = 200000                  # ticks of the time-stamp counter a page
_TIMEOUT = 50.0                 # seconds


def _read_number(block: Ram, name: str) -> int:
    return writer.parse_table(block.read(writer.assemble().addresses[name], 4))[0]


def _write(model: BlockModel, page: int, words: Iterable[Tuple[int, int]]) -> None:
    for offset, word in words:
        model.write(_BASE + page * PAGE + offset, struct.pack('<I', word))


class WriterGuest:
    """What a QEMU needs to run it, and what is known about its pages."""

    def __init__(self, seed: int, size: int, prefix: str):
        """
        size: of RAM, bytes
        prefix: of the names of its files
        """
        self._pages = (size - _BASE - _GAP) // PAGE
        self._serial = writer.Serial(f'{prefix}-serial')
        mask = (1 << (self._pages // 2).bit_length() - 1) - 1
        with open(f'{prefix}-firmware', 'wb') as file:
            file.write(writer.firmware(BASE=_BASE, PAGES=self._pages,
                                       FOCUS_MASK=mask, TURN=_TURN,
                                       SEED=seed & 0x7fffffff))
        self.arguments = ('-bios', f'{prefix}-firmware', *self._serial.arguments)

    @staticmethod
    def clear_area(kinds: bytearray) -> None:
        """Its table is to be empty, and it takes other pages for untouched."""
        for page in range(_TABLE_START // PAGE, len(kinds)):
            if kinds[page] == DATA:
                kinds[page] = ZERO

    def _wait_for(self, letter: str, count: int) -> None:
        deadline = time.monotonic() + _TIMEOUT
        if not self._serial.wait_for(letter, count,
                                     lambda: time.monotonic() < deadline):
            raise Wrong(f'the guest has not said {letter} {count} times within '
                        f'{_TIMEOUT:g} seconds')

    def batches(self) -> int:
        """How many times it has written a few hundred pages."""
        return self._serial.said('B')

    def wait_until_it_writes(self) -> None:
        """Another batch."""
        self._wait_for('B', self.batches() + 1)

    def check_itself(self, qemu: Qemu, qtest: Qtest) -> None:
        """Let it check all of its pages, and run on; it must be stopped."""
        qtest.write(writer.assemble().addresses['VERIFY'], b'\1\0\0\0')
        qemu.qmp('cont')
        self._wait_for('V', 1)
        self.wait_until_it_writes()

    def apply(self, block: Ram, model: BlockModel) -> None:
        """Put into the model what the guest has written, by its table."""
        table = writer.parse_table(block.read(
            writer.assemble().addresses['TABLE'], 4 * self._pages))
        for page, sequence in enumerate(table):
            if sequence:
                _write(model, page, writer.expected_words(page, sequence))
        last, current = (_read_number(block, name) for name in ('SEQUENCE', 'CURRENT'))
        if last not in table and current < self._pages:
            model.touch(_BASE + current * PAGE)     # reading may populate it
            _write(model, current, writer.unfinished_words(
                current, last, block.read(_BASE + current * PAGE, PAGE)))

    @staticmethod
    def allow(allowed: bytearray) -> None:
        """What it may populate besides what it writes to."""
        allowed[:_LOW // PAGE] = b'\1' * (_LOW // PAGE)

    @staticmethod
    def is_its_own(page: int) -> bool:
        """Whether nothing is known about the content of a page."""
        return page < _LOW // PAGE
