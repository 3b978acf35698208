# SPDX-License-Identifier: GPL-2.0-or-later
"""One side of a random migration: a QEMU, its RAM blocks, what they have to hold."""

import ctypes
import os
import random
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from lab.memory import MIB
from lab.migrate import configure
from lab.outcome import Wrong
from lab.qemu import Qemu
from lab.qtest_client import Qtest
from lab.ram import Ram, Writer, find_blocks
from lab.random.case import BACKENDS, STOCK, TLS, BlockSide, Case, Side
from lab.random.model import (DATA, HOLE, PAGE, THP, ZERO, BlockModel, Content,
                              expand, in_extents, in_units, minus, runs_of)
from lab.random.writer_guest import WriterGuest

TIMEOUT = 60.0                  # seconds, for what takes less than one
_UUID = 'c7b1c2de-5b5c-4e47-9d0a-9f3a6f0a2a10'

# Channels are encrypted with a key that both sides have
_KEYS = 'qemu:009d5638c40fde0c\n'

# Of a file with offset=, what lies behind the block
_TAIL = 64 << 10

# Where a PC has no RAM
_NO_RAM = range(0xa0000, 0x100000)

_ZEROES = memoryview(bytes(1 << 20))


@dataclass(frozen=True)
class Setup:
    """What to run the cases with.

    binaries: of 'patched' and 'stock'
    sabotage: break a promise on purpose, behind the expectations' back:
    'stock-destination' or 'holes-off'
    say: gets what is done
    """
    binaries: Dict[str, str]
    floor: int = 1 << 30
    sabotage: str = ''
    say: Callable[[str], None] = lambda _: None


_PR_SET_THP_DISABLE = 41


@contextmanager
def _thp(enabled: bool) -> Iterator[None]:
    """Processes that are started meanwhile have huge pages, or have none."""
    libc = ctypes.CDLL(None, use_errno=True)

    def disable(value: int) -> None:
        if libc.prctl(_PR_SET_THP_DISABLE, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), 'prctl(PR_SET_THP_DISABLE)')

    disable(not enabled)
    try:
        yield
    finally:
        disable(0)


class Memory:
    """A RAM block of one side.

    name: for people.  number: among the blocks.  spec: both sides of it.
    address: in the guest.
    model: what it has to hold.
    ram: the block itself.
    before: the pages that were populated before the migration.
    allocated_before: bytes.
    """
    ram: Ram
    before: bytearray
    allocated_before: int

    def __init__(self, case: Case, number: int, name: str, directory: str):
        self._case = case
        self.number = number
        self.name = f'{name}, block {number}'
        self.spec = case.blocks[number]
        self.address = sum(block.size for block in case.blocks[:number]) * MIB
        self.size = self.spec.size * MIB
        self._side: BlockSide = getattr(self.spec, name)
        self._backend = BACKENDS[self._side.backend]
        self._file = ''
        if self._backend.directory is not None:
            # The names of files below /dev/shm are everybody's
            self._file = (f'{self._backend.directory or directory}/'
                          f'{os.path.basename(directory)}-{name}-{number}')
        self.model = self.initial()

    def initial(self) -> BlockModel:
        """What it has before the migration."""
        side = self._side
        kinds = expand(side.pattern, side.pattern_seed, self.size // PAGE,
                       self._case.chunk)
        if self._case.dirty == 'guest':
            WriterGuest.clear_area(kinds)
        return BlockModel(kinds, Content(side.pattern_seed + 1))

    def object(self) -> str:
        """The value of -object."""
        side = self._side
        options = self._backend.object(f'ram{self.number}', self.size, self._file)
        return (options + (f',offset={side.offset:#x}' if side.offset else '')
                + (',prealloc=on' if side.prealloc else ''))

    # The file that it may have

    def create_file(self) -> None:
        """Also writes to it, unless that is to be done by the process."""
        if not self._file:
            return
        side = self._side
        with open(self._file, 'x+b', buffering=0) as file:
            file.truncate(side.offset + self.size + (_TAIL if side.offset else 0))
            for offset, page in self._around():
                os.pwrite(file.fileno(), page, offset)
            if not side.in_process:
                self._populate(Writer(file.fileno(), side.offset))

    def remove_file(self) -> None:
        """Afterwards."""
        if self._file:
            with suppress(FileNotFoundError):
                os.unlink(self._file)

    def _around(self) -> List[Tuple[int, bytes]]:
        """Offsets and pages of what the file has in front of the block and behind."""
        side = self._side
        if not side.offset:
            return []
        return [(where, Content(side.pattern_seed + 2 + which).page(7))
                for which, where in enumerate((0, side.offset + self.size))]

    def check_around(self) -> None:
        """That was not touched."""
        for offset, page in self._around():
            with open(self._file, 'rb') as file:
                if os.pread(file.fileno(), PAGE, offset) != page:
                    raise Wrong(f'{self.name}: the file has changed '
                                + ('behind' if offset else 'in front of')
                                + ' the block')

    # The content

    def _populate(self, writer: Writer) -> None:
        """Write what the model says; pages of zeroes, too."""
        content = memoryview(self.model.content)
        for start, end, kind in runs_of(self.model.kinds):
            if kind == DATA:
                writer.write(start * PAGE, content[start * PAGE:end * PAGE])
            elif kind == ZERO:
                for at in range(start * PAGE, end * PAGE, len(_ZEROES)):
                    writer.write(at, _ZEROES[:end * PAGE - at])

    def populated(self) -> Optional[bytearray]:
        """Pages that the kernel says are there; None with hugetlbfs."""
        return None if self.ram.huge else in_extents(list(self.ram.extents()),
                                                     self.size // PAGE)

    def attach(self, ram: Ram) -> None:
        """The process is there: give it the rest of the content."""
        self.ram = ram
        if not self._file or self._side.in_process:
            with ram.writer(self._side.in_process) as writer:
                self._populate(writer)

    def remember(self) -> None:
        """How it is before the migration."""
        pages = self.populated()
        planned = bytearray(kind != HOLE for kind in self.model.kinds)
        if pages is None:
            pages = in_units(planned, THP // PAGE)
        elif minus(planned, pages):
            raise RuntimeError(f'{self.name}: not all is populated that was written')
        self.before = pages
        self.allocated_before = self.ram.allocated() or 0


class Machine:
    """One side of a case."""

    def __init__(self, name: str, case: Case, side: Side, setup: Setup, directory: str):
        self.name = name
        self.case = case
        self.side = side
        self._setup = setup
        self._directory = directory
        self.blocks = [Memory(case, number, name, directory)
                       for number in range(len(case.blocks))]
        self.qtest = Qtest(f'{directory}/{name}-qtest', 2 * TIMEOUT)
        self.guest = WriterGuest(case.seed, self.blocks[0].size,
                                 f'{directory}/{name}') \
            if case.dirty == 'guest' else None
        self.qemu = Qemu(name, setup.binaries[self._binary()], self._arguments())

    def _binary(self) -> str:
        if self.name == 'destination' and self._setup.sabotage == 'stock-destination':
            return STOCK
        return self.side.binary

    def _arguments(self) -> List[str]:
        case = self.case
        one = ',memory-backend=ram0' if len(self.blocks) == 1 else ''
        properties = dict(case.properties)
        if self.side.binary != STOCK and self._binary() != STOCK and \
                (not self.side.holes or self._setup.sabotage == 'holes-off'):
            properties['x-ram-holes'] = 'off'
        arguments = ['-nodefaults', '-no-user-config', '-uuid', _UUID,
                     '-machine', case.machine + one,
                     '-m', f'{sum(block.size for block in self.blocks) // MIB}M']
        for block in self.blocks:
            arguments += ['-object', block.object()]
            if not one:
                arguments += ['-numa', f'node,nodeid={block.number},'
                                       f'memdev=ram{block.number}']
        for name, value in properties.items():
            arguments += ['-global', f'migration.{name}={value}']
        if self.side.locked:
            arguments += ['-overcommit', 'mem-lock=on']
        if self.side.parameters.get('tls-creds'):
            arguments += ['-object', self._credentials()]
        arguments += self.qtest.arguments
        if self.guest:
            arguments += ['-accel', 'tcg', *self.guest.arguments]
        else:
            arguments += ['-accel', 'qtest']
        # After precopy a guest would run on before it is compared
        if not self.guest or case.mode != 'postcopy' or self.name == 'source':
            arguments.append('-S')
        if self.name == 'destination' and case.mode != 'savevm':
            arguments += ['-incoming', 'defer']
        return arguments

    def _credentials(self) -> str:
        """An object; both sides have the same key."""
        with open(f'{self._directory}/keys.psk', 'w', encoding='ascii') as file:
            file.write(_KEYS)
        endpoint = 'server' if self.name == 'destination' else 'client'
        return (f'tls-creds-psk,id={TLS},dir={self._directory},'
                f'endpoint={endpoint}')

    @contextmanager
    def started(self) -> Iterator['Machine']:
        """Start it, with all that it has to have before."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.remove_file)
                block.create_file()
            with _thp(self.case.thp):
                stack.enter_context(self.qemu)
            stack.enter_context(self.qtest)
            found = find_blocks(self.qemu)
            for block in self.blocks:
                block.attach(found[f'ram{block.number}'])
            for block in self.blocks:
                block.remember()
            self._setup.say(f'{self.name}: {self.side}')
            configure(self.qemu, self.side.capabilities, self.side.parameters)
            yield self

    # What a guest would do

    def guest_write(self, block: Memory, offset: int, data: bytes) -> None:
        """Through QEMU, so that it gets into the dirty bitmap."""
        self.qtest.write(block.address + offset, data)
        block.model.write(offset, data)

    def guest_read(self, block: Memory, offset: int, length: int) -> None:
        """Also compares it with what has to be there."""
        got = self.qtest.read(block.address + offset, length)
        block.model.touch(offset)
        right = block.model.content[offset:offset + length]
        if got != right:
            raise Wrong(f'{block.name}: a read at {offset:#x} got {got.hex()}, '
                        f'not {right.hex()}')

    def random_place(self, rng: random.Random, length: int) -> Tuple[Memory, int]:
        """A block, and an offset where length bytes are RAM."""
        block = self.blocks[rng.randrange(len(self.blocks))]
        while True:
            page = rng.randrange(block.size // PAGE)
            offset = page * PAGE + rng.choice(
                (0, PAGE - length, rng.randrange(PAGE - length + 1)))
            if block.number or not (offset in _NO_RAM or
                                    offset + length - 1 in _NO_RAM):
                return block, offset
