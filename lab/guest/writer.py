# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest of lab/qtest/sparse-writer.S, for Python.

It writes to pages in pseudo-random order, numbers its writes, and remembers in a
table which was the last one to each page.  So what a page has to hold can be told
from outside as well.  What the guest and its host agree on is in sparse-writer.h.
"""

import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Callable, Dict, List, Tuple

from lab import UserError
from lab.base import ROOT
from lab.outcome import expect

_DIRECTORY = os.path.join(ROOT, 'lab/qtest')
_SOURCE = os.path.join(_DIRECTORY, 'sparse-writer.S')
_HEADER = os.path.join(_DIRECTORY, 'sparse-writer.h')
_SECTION = '.rodata.sparse_writer'

_FIRMWARE_SIZE = 64 << 10       # bytes, the least that a PC can have
_PAGE_SIZE = 4096
_STRIDE = 512                   # bytes from word to word of a page
_WORD = 1 << 32


def parse_header(text: str) -> Dict[str, int]:
    """The numbers of sparse-writer.h, by name without SPARSE_WRITER_.

    Each is a number, or another name with a number added.
    """
    numbers: Dict[str, int] = {}
    for name, value in re.findall(r'^#define SPARSE_WRITER_(\w+) (\S.*)$', text,
                                  re.MULTILINE):
        match = re.fullmatch(r'\(SPARSE_WRITER_(\w+) \+ (\d+)\)', value)
        numbers[name] = (numbers[match[1]] + int(match[2]) if match else int(value, 0))
    return numbers


@dataclass(frozen=True)
class WriterProgram:
    """code: what is at the end of the firmware.  addresses: see the header."""
    code: bytes
    addresses: Dict[str, int]


def _run(command: List[str]) -> None:
    result = subprocess.run(command, check=False, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)
    if result.returncode:
        raise UserError('the guest cannot be assembled here, which takes an x86 '
                        'host, gcc and binutils: '
                        + result.stdout.strip().partition('\n')[0])


@functools.lru_cache(maxsize=None)
def assemble() -> WriterProgram:
    """Assembles the guest; raises UserError where that cannot be done."""
    missing = [tool for tool in ('cc', 'objcopy') if not shutil.which(tool)]
    if missing:
        raise UserError('the guest cannot be assembled without '
                        f"{' and '.join(missing)}: run 'make deps' first")
    with open(_HEADER, encoding='ascii') as header:
        addresses = parse_header(header.read())
    with tempfile.TemporaryDirectory() as directory:
        linked = os.path.join(directory, 'writer.o')
        binary = os.path.join(directory, 'writer')
        _run(['cc', '-c', '-o', linked, _SOURCE])
        _run(['objcopy', '-O', 'binary', '-j', _SECTION, '--set-section-flags',
              f'{_SECTION}=alloc', linked, binary])
        with open(binary, 'rb') as file:
            return WriterProgram(file.read(), addresses)


def firmware(**parameters: int) -> bytes:
    """A firmware, for -bios, that is the guest.

    @parameters: those of sparse-writer.h that shall not be the default, such
                 as BASE
    """
    program = assemble()
    code = bytearray(program.code)
    for name, value in parameters.items():
        struct.pack_into('<I', code, program.addresses[name]
                         - program.addresses['LOAD'], value)
    return bytes(_FIRMWARE_SIZE - len(code)) + bytes(code)


def expected_words(page: int, sequence: int) -> List[Tuple[int, int]]:
    """What the guest has written to a page last: offsets, and 32-bit words.

    @page: number of the page, counted from BASE
    @sequence: number of the write, from the table
    """
    word, step = (0, 0) if sequence % 4 == 0 else (
        sequence, (page * 0x9e3779b1 + 1) % _WORD)
    words, checksum = [], 0
    for offset in range(0, _PAGE_SIZE, _STRIDE):
        words.append((offset, word))
        checksum = (((checksum << 5 | checksum >> 27) + word) % _WORD)
        word = (word + step) % _WORD
    return [*words, (_PAGE_SIZE - 4, checksum)]


def unfinished_words(page: int, sequence: int, content: bytes) -> List[Tuple[int, int]]:
    """What the guest has written so far of a page that it is at.

    It writes from the start of the page to its end, and may be stopped
    anywhere.

    @page, @sequence: as for expected_words(), of the write
    @content: of the page

    Returns the longest part of expected_words() that is there.
    """
    words = expected_words(page, sequence)
    for count, (offset, word) in enumerate(words):
        if struct.unpack_from('<I', content, offset) != (word,):
            return words[:count]
    return words


def parse_table(table: bytes) -> List[int]:
    """The numbers of the last writes; 0 where there was none."""
    return [number for number, in struct.iter_unpack('<I', table)]


class Serial:
    """What the guest says, a letter at a time, in a file that QEMU writes."""

    def __init__(self, path: str):
        self._path = path
        self.arguments = ('-serial', f'file:{path}')

    def said(self, letter: str) -> int:
        """How many times it has said this; raises Wrong if it has found an error."""
        try:
            with open(self._path, encoding='ascii', errors='replace') as file:
                said = file.read()
        except FileNotFoundError:
            return 0
        expect('X' not in said, 'the guest has found a page that is wrong')
        return said.count(letter)

    def wait_for(self, letter: str, count: int, alive: Callable[[], bool]) -> bool:
        """Wait until it has said this so many times; whether it has, before alive()
        was false.
        """
        while self.said(letter) < count:
            if not alive():
                return False
            time.sleep(0.005)
        return True
