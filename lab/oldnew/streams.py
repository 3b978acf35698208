# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare the streams that the patched and the stock QEMU send.

Both send the same stopped guest, with data, populated zeroes and holes in
several blocks of RAM.  Without the capability sparse-ram, the streams have to be
the same: the records of RAM one by one, but for where their sections end, which
depends on time; what goes through a channel of multifd page by page, for the same
reason; all else, and mapped-ram files, byte by byte.

Each case also changes one byte of what it has compared, which must not go
unnoticed, and looks whether the patched QEMU has found holes and left them alone.

Output is TAP.
"""

import argparse
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Iterator, List, Optional, Tuple

from lab import content
from lab.ci.cases import Case, add_arguments, run_cases
from lab.cli import memory_floor, ready, run_main
from lab.measure.operation import Session, wait_for_migration
from lab.memory import MIB
from lab.migrate import configure, watched
from lab.modes import MODES, POSTCOPY, PRECOPY, Mode
from lab.outcome import expect
from lab.qemu import Guest
from lab.ram import KINDS, Ram
from lab.stream import (Stream, StreamError, difference, first_difference,
                        multifd_difference, without_empty_sections)

SIZE = 64 * MIB                 # of main memory
SEED = 11
TIMEOUT = 120.0                 # seconds, for what takes a few

# More blocks: their kind, and bytes
BLOCKS = (('memfd', 48 * MIB), ('anonymous', 40 * MIB),
          ('shm-directory-private', 24 * MIB))


def block_arguments() -> Iterator[str]:
    """For QEMU's command line."""
    yield from ('-m', f'{SIZE // MIB}M,slots={len(BLOCKS)},maxmem=1G')
    for number, (kind, size) in enumerate(BLOCKS):
        yield from ('-object', KINDS[kind].object(f'dimm{number}', size,
                                                  reserve=False),
                    '-device', f'pc-dimm,memdev=dimm{number}')


# What else would depend on when QEMU was started
FIXED_TIME = '-rtc', 'base=2020-01-01T00:00:00,clock=vm'


class Catcher:
    """Listens on a Unix socket, and takes whatever comes.

    A context manager; ends on exit.
    """
    # MIG_RP_MSG_SHUT: the destination has all, and there was no error.  Sent
    # at the start, because it is the end of the return path for the source.
    _SHUT = struct.pack('>HHI', 1, 4, 0)

    def __init__(self, path: str, return_path: bool):
        self.uri = f'unix:{path}'
        self._return_path = return_path
        self._caught: List[bytearray] = []
        self._threads: List[threading.Thread] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> 'Catcher':
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes up who is in accept()
        self._server.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._server.accept()[0]
            except OSError:
                return
            data = bytearray()
            self._caught.append(data)
            thread = threading.Thread(target=self._receive, daemon=True,
                                      args=(connection, data))
            self._threads.append(thread)
            thread.start()

    def _receive(self, connection: socket.socket, data: bytearray) -> None:
        with connection:
            if self._return_path:
                connection.sendall(self._SHUT)
            while True:
                try:
                    part = connection.recv(MIB)
                except ConnectionResetError:
                    return
                if not part:
                    return
                data += part

    def connections(self) -> List[bytes]:
        """What each of them brought, when the other side has closed them."""
        for thread in self._threads:
            thread.join(TIMEOUT)
            expect(not thread.is_alive(), 'QEMU has not closed a connection')
        return [bytes(data) for data in self._caught]


@dataclass(frozen=True)
class Way:
    """A mode, and what the patched QEMU makes of it.

    patched_args: more arguments for the patched QEMU only.
    differs: whether the streams must not be the same.
    holes: whether the patched QEMU looks for holes.
    """
    name: str
    mode: Mode = PRECOPY
    machine: str = 'q35'
    patched_args: Tuple[str, ...] = ()
    differs: bool = False
    holes: bool = True
    quick: bool = False


def _one_channel(name: str, **more: Any) -> Way:
    """What goes through which of several channels depends on time."""
    return Way(name, MODES[name].also(multifd_channels=1), **more)


WAYS = (
    Way('plain', quick=True),
    Way('xbzrle', MODES['xbzrle']),
    Way('postcopy-ram', POSTCOPY, quick=True),
    Way('return-path', MODES['return-path']),
    Way('pc-q35-7.2', machine='pc-q35-7.2'),
    Way('pc-i440fx-7.2', machine='pc-i440fx-7.2'),
    Way('x-ram-holes-off', holes=False,
        patched_args=('-global', 'migration.x-ram-holes=off')),
    # Holes are not looked for, but to send zeroes without reading them
    Way('no-zero-page-detection', MODES['no-zero-page-detection'],
        holes=False),
    Way('file', MODES['file'], quick=True),
    Way('exec', MODES['exec']),
    _one_channel('multifd', quick=True),
    _one_channel('multifd-legacy'),
    _one_channel('multifd-no-zero-page-detection', holes=False),
    _one_channel('multifd-zlib'),
    Way('mapped-ram', MODES['mapped-ram'], quick=True),
    _one_channel('mapped-ram-multifd'),
    Way('sparse-ram', patched_args=('-global', 'migration.sparse-ram=on'),
        differs=True, quick=True))


@dataclass(frozen=True)
class Sent:
    """What a QEMU has sent.

    parts: the main channel first.
    holes: pages, as QEMU says it; None if it does not.
    """
    parts: List[bytes]
    holes: Optional[int]


def _is_main(data: bytes) -> bool:
    return data.startswith(b'QEVM')


def send(binary: str, way: Way, arguments: Tuple[str, ...]) -> Sent:
    """Start a guest, prepare its RAM, and let it be sent."""
    with ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix='same-stream-'))
        path = os.path.join(directory, 'stream')
        catcher = None
        mode, uri = way.mode, way.mode.uris(path)[0]
        if not mode.file:
            catcher = stack.enter_context(Catcher(path, bool(
                {'postcopy-ram', 'return-path'} & set(mode.capabilities))))
            uri = catcher.uri
        guest = stack.enter_context(Guest(
            'source', binary, SIZE, paused=True,
            extra_args=('-machine', way.machine, *block_arguments(),
                        *FIXED_TIME, *arguments)))
        watchdog = stack.enter_context(watched((guest,), memory_floor(), TIMEOUT))
        rams = [guest.ram, *(
            Ram.of(guest.pid, size, KINDS[kind].fs is not None)
            for kind, size in BLOCKS)]
        for number, ram in enumerate(rams):
            content.write(ram, SEED + number)
        before = guest.ram.allocated()
        configure(guest, mode.capabilities,
                  {'max-bandwidth': 1 << 40, **mode.parameters})

        guest.qmp('migrate', uri=uri)
        info = wait_for_migration(Session(guest, None, watchdog, directory), guest)
        holes = info['ram'].get('holes')
        if holes:
            expect(guest.ram.allocated() == before, 'the source has populated holes')
        if catcher:
            parts = sorted(catcher.connections(), key=_is_main, reverse=True)
        else:
            with open(path, 'rb') as file:
                parts = [file.read()]
    return Sent(parts, holes)


def compare(mode: Mode, one: Sent, other: Sent) -> Optional[str]:
    """What differs first, None if nothing does."""
    if len(one.parts) != len(other.parts):
        return f'{len(one.parts)} and {len(other.parts)} connections'
    for number, (left, right) in enumerate(zip(one.parts, other.parts)):
        if 'mapped-ram' in mode.capabilities:
            byte = first_difference(without_empty_sections(left),
                                    without_empty_sections(right))
            found = None if byte is None else f'byte {byte:#x} of the file'
        elif _is_main(left):
            found = difference(Stream(left), Stream(right))
        else:
            found = multifd_difference(left, right)
        if found:
            return f'connection {number}: {found}'
    return None


def notices_change(mode: Mode, sent: Sent) -> bool:
    """Whether compare() finds out that one byte was changed."""
    parts = list(sent.parts)
    largest = max(range(len(parts)), key=lambda number: len(parts[number]))
    data = bytearray(parts[largest])
    data[len(data) // 2 + random.randrange(64)] ^= 1
    parts[largest] = bytes(data)
    try:
        return compare(mode, sent, replace(sent, parts=parts)) is not None
    except (StreamError, struct.error, zlib.error):
        return True             # as it was the length of something


def check_stock(binary: str, extra_args: Tuple[str, ...]) -> None:
    """The same guest, sent twice by the same QEMU."""
    found = compare(PRECOPY, *(send(binary, WAYS[0], extra_args) for _ in range(2)))
    expect(found is None, f'twice the same QEMU: {found}')


def check(binaries: Tuple[str, str], extra_args: Tuple[str, ...], way: Way) -> None:
    """One case, with the stock and the patched QEMU."""
    stock = send(binaries[0], way, extra_args)
    patched = send(binaries[1], way, (*extra_args, *way.patched_args))
    found = compare(way.mode, stock, patched)
    if way.differs:
        expect(found is not None, 'the streams are the same')
        return
    expect(found is None, f'stock and patched: {found}')
    expect(patched.holes is not None and bool(patched.holes) == way.holes,
           f'the patched QEMU has found {patched.holes} holes')
    expect(notices_change(way.mode, patched),
           'the comparison does not notice a byte that differs')


def all_cases(args: argparse.Namespace) -> Iterator[Case]:
    """One for each mode; and, to know that all else is the same each time,
    the stock QEMU with itself."""
    extra = tuple(args.qemu_args)
    yield Case('stock-twice', partial(check_stock, args.stock, extra), quick=True)
    for way in WAYS:
        yield Case(way.name, partial(check, (args.stock, args.patched), extra,
                                     way), quick=way.quick)


def run() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').split('\n\n', maxsplit=1)[0])
    add_arguments(parser)
    args = parser.parse_args()
    ready(args)
    return run_cases(list(all_cases(args)), args)


if __name__ == '__main__':
    sys.exit(run_main('same-stream', run))
