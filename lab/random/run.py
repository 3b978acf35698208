# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a random migration, and compare what came of it with the model."""

import ctypes
import os
import random
import resource
import socket
import struct
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from lab import UserError, host
from lab.memory import MIB, available
from lab.migrate import (MigrationFailed, configure, listen, run_job, watched)
from lab.modes import TCP
from lab.outcome import (FAILED, PASSED, SKIPPED, Outcome, Unavailable, Wrong)
from lab.qemu import GuestError, Qemu
from lab.qtest_client import Qtest
from lab.ram import Ram, Writer, find_blocks
from lab.random.case import (BACKENDS, STOCK, TLS, Block, BlockSide, Case,
                             Side, policy, source_reads)
from lab.random.model import (DATA, HOLE, PAGE, THP, ZERO, BlockModel,
                              Content, allowed_on_destination,
                              allowed_on_source, expand, in_extents, in_units,
                              minus, runs_of, some, union)
from lab.random.writer_guest import WriterGuest

TIMEOUT = 60.0                  # seconds, for what takes less than one
_FAST = 8 << 30                 # bytes a second: no limit
_POLL = 0.002                   # seconds
_UUID = 'c7b1c2de-5b5c-4e47-9d0a-9f3a6f0a2a10'

# What a QEMU may take if all of it is locked
_LOCKED = 1 << 30

# Channels are encrypted with a key that both sides have
_KEYS = 'qemu:009d5638c40fde0c\n'

# The disk that has an internal snapshot, and the snapshot's tag
_DISK = 'disk0'
_TAG = 'random'

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


# What this machine has

def _require(case: Case, directory: str, stack: ExitStack) -> None:
    """Raise Unavailable if something is missing.

    stack: of what is to be undone when the case is over
    """
    if any('hugetlb' in side.backend for block in case.blocks
           for side in (block.source, block.destination)):
        stack.enter_context(host.locked_huge_pages(64))
    # With some room for what is around a block
    host.require_shm(sum((block.size + 1) * MIB for block in case.blocks
                         for side in (block.source, block.destination)
                         if side.backend.startswith('shm')))
    if case.source.parameters.get('direct-io') and \
            not host.direct_io_works(directory):
        raise Unavailable(f'no O_DIRECT in {os.path.dirname(directory)} '
                          '(set TMPDIR)')
    if any(side.locked for side in (case.source, case.destination)) and \
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < _LOCKED and \
            os.geteuid():
        raise Unavailable(f'no more than {_LOCKED // MIB} MiB of memory can '
                          'be locked (ulimit -l)')
    if case.postcopy or case.mode == 'background-snapshot':
        host.require_userfaultfd()


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


# One side

class Machine:
    """One side of a case: the QEMU, its blocks, and what they have to hold."""

    def __init__(self, name: str, case: Case, side: Side, setup: Setup,
                 directory: str):
        self.name = name
        self.case = case
        self.side = side
        self._setup = setup
        self._directory = directory
        self.block_sides = [getattr(block, name) for block in case.blocks]
        self._files = [self._file(number)
                       for number in range(len(case.blocks))]
        self.models = [self.initial(number)
                       for number in range(len(case.blocks))]
        self.qtest = Qtest(f'{directory}/{name}-qtest', 2 * TIMEOUT)
        self.guest = WriterGuest(case.seed, case.blocks[0].size * MIB,
                                 f'{directory}/{name}') \
            if case.dirty == 'guest' else None
        self.qemu = Qemu(name, setup.binaries[self._binary()],
                         self._arguments())
        self.blocks: List[Ram] = []
        self.before: List[bytearray] = []
        self.allocated_before: List[int] = []

    def _binary(self) -> str:
        if self.name == 'destination' and \
                self._setup.sabotage == 'stock-destination':
            return STOCK
        return self.side.binary

    # What there is before

    def _file(self, number: int) -> Optional[str]:
        directory = BACKENDS[self.block_sides[number].backend].directory
        if directory is None:
            return None
        # The names of files below /dev/shm are everybody's
        return (f'{directory or self._directory}/'
                f'{os.path.basename(self._directory)}-{self.name}-{number}')

    def initial(self, number: int) -> BlockModel:
        """What a block has before the migration."""
        case, side = self.case, self.block_sides[number]
        pages = case.blocks[number].size * MIB // PAGE
        kinds = expand(side.pattern, side.pattern_seed, pages, case.chunk)
        if case.dirty == 'guest':
            WriterGuest.clear_area(kinds)
        return BlockModel(kinds, Content(side.pattern_seed + 1))

    def _create_file(self, number: int) -> None:
        """Also writes to it, unless that is to be done by the process."""
        path, side = self._files[number], self.block_sides[number]
        assert path
        size = self.case.blocks[number].size * MIB
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, side.offset + size
                         + (_TAIL if side.offset else 0))
            if side.offset:
                os.pwrite(fd, _around(side, 0), 0)
                os.pwrite(fd, _around(side, 1), side.offset + size)
            if not side.in_process:
                _populate(Writer(fd, side.offset), self.models[number])
        finally:
            os.close(fd)

    def check_around(self) -> None:
        """What a file has in front of and behind the block is not touched."""
        for number, side in enumerate(self.block_sides):
            if not side.offset:
                continue
            path = self._files[number]
            assert path
            end = side.offset + self.case.blocks[number].size * MIB
            with open(path, 'rb') as file:
                if file.read(PAGE) != _around(side, 0):
                    raise Wrong(f'{self.name}, block {number}: the file '
                                'has changed in front of the block')
                file.seek(end)
                if file.read(PAGE) != _around(side, 1):
                    raise Wrong(f'{self.name}, block {number}: the file '
                                'has changed behind the block')

    # The process

    def _object(self, number: int) -> str:
        side = self.block_sides[number]
        options = [BACKENDS[side.backend].object(
            f'ram{number}', self.case.blocks[number].size * MIB,
            self._files[number] or '')]
        if side.offset:
            options.append(f'offset={side.offset:#x}')
        if side.prealloc:
            options.append('prealloc=on')
        return ','.join(options)

    def _arguments(self) -> List[str]:
        case = self.case
        count = len(case.blocks)
        one = ',memory-backend=ram0' if count == 1 else ''
        properties = dict(case.properties)
        if self.side.binary != STOCK and self._binary() != STOCK and \
                (not self.side.holes or self._setup.sabotage == 'holes-off'):
            properties['x-ram-holes'] = 'off'
        arguments = ['-nodefaults', '-no-user-config', '-uuid', _UUID,
                     '-machine', case.machine + one,
                     '-m', f'{sum(block.size for block in case.blocks)}M']
        for number in range(count):
            arguments += ['-object', self._object(number)]
            if count > 1:
                arguments += ['-numa', f'node,nodeid={number},'
                                       f'memdev=ram{number}']
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
        with open(f'{self._directory}/keys.psk', 'w',
                  encoding='ascii') as file:
            file.write(_KEYS)
        endpoint = 'server' if self.name == 'destination' else 'client'
        return (f'tls-creds-psk,id={TLS},dir={self._directory},'
                f'endpoint={endpoint}')

    @contextmanager
    def started(self) -> Iterator['Machine']:
        """Start it, with all that it has to have before."""
        with ExitStack() as stack:
            stack.callback(self._remove_files)
            for number, path in enumerate(self._files):
                if path:
                    self._create_file(number)
            with _thp(self.case.thp):
                stack.enter_context(self.qemu)
            stack.enter_context(self.qtest)
            self._find()
            self._configure()
            yield self

    def _remove_files(self) -> None:
        for path in self._files:
            if path and os.path.exists(path):
                os.unlink(path)

    def _find(self) -> None:
        found = find_blocks(self.qemu)
        for number, side in enumerate(self.block_sides):
            block = found[f'ram{number}']
            if not self._files[number] or side.in_process:
                with block.writer(side.in_process) as writer:
                    _populate(writer, self.models[number])
            self.blocks.append(block)
        for block, model in zip(self.blocks, self.models):
            pages = populated(block)
            planned = bytearray(kind != HOLE for kind in model.kinds)
            if pages is None:
                pages = in_units(planned, THP // PAGE)
            elif minus(planned, pages):
                raise RuntimeError(f'{self.name}: not all is '
                                   'populated that was written')
            self.before.append(pages)
            self.allocated_before.append(block.allocated() or 0)

    def _configure(self) -> None:
        self._setup.say(f'{self.name}: {self.side}')
        configure(self.qemu, self.side.capabilities, self.side.parameters)

    # What a guest would do

    def _address(self, number: int) -> int:
        return sum(block.size for block in self.case.blocks[:number]) * MIB

    def guest_write(self, number: int, offset: int, data: bytes) -> None:
        """Through QEMU, so that it gets into the dirty bitmap."""
        self.qtest.write(self._address(number) + offset, data)
        self.models[number].write(offset, data)

    def guest_read(self, number: int, offset: int, length: int) -> None:
        """Also compares it with what has to be there."""
        model = self.models[number]
        got = self.qtest.read(self._address(number) + offset, length)
        model.touch(offset)
        if got != model.content[offset:offset + length]:
            raise Wrong(
                f'{self.name}, block {number}: a read at {offset:#x} got '
                f'{got.hex()}, not '
                f'{model.content[offset:offset + length].hex()}')

    def random_place(self, rng: random.Random,
                     length: int) -> Tuple[int, int]:
        """Number of a block, and an offset where length bytes are RAM."""
        number = rng.randrange(len(self.blocks))
        size = self.blocks[number].size
        while True:
            page = rng.randrange(size // PAGE)
            offset = page * PAGE + rng.choice(
                (0, PAGE - length, rng.randrange(PAGE - length + 1)))
            if number or not (offset in _NO_RAM or
                              offset + length - 1 in _NO_RAM):
                return number, offset


def _around(side: BlockSide, which: int) -> bytes:
    """What a file has in front of, and behind, the block."""
    return Content(side.pattern_seed + 2 + which).page(7)


def _populate(writer: Writer, model: BlockModel) -> None:
    """Write what the model says; pages of zeroes, too."""
    content = memoryview(model.content)
    for start, end, kind in runs_of(model.kinds):
        if kind == DATA:
            writer.write(start * PAGE, content[start * PAGE:end * PAGE])
        elif kind == ZERO:
            for at in range(start * PAGE, end * PAGE, len(_ZEROES)):
                writer.write(at, _ZEROES[:end * PAGE - at])


def populated(block: Ram) -> Optional[bytearray]:
    """Pages that the kernel says are there; None with hugetlbfs."""
    return None if block.huge else in_extents(list(block.extents()),
                                              block.size // PAGE)


# The migration

class Migration:
    """From the first command to the end of both sides."""

    def __init__(self, case: Case, source: Machine, destination: Machine,
                 setup: Setup, directory: str):
        self.case = case
        self.source = source
        self.destination = destination
        self._say = setup.say
        self._directory = directory
        self._rng = random.Random(f'{case.seed} run')
        self._pending = (self._rng.randrange(1, 12)
                         if case.dirty == 'qtest' else 0)
        self._accesses = self._rng.randrange(1, 24)
        self._done: List[str] = []
        self._batches = 0
        self._rounds = self._rng.randrange(1, 8)
        self._started = 0.0

    def run(self) -> None:
        """Raises MigrationFailed if it does not complete on both sides."""
        if self.source.guest:
            self.source.qemu.qmp('cont')
            self.source.guest.wait_until_it_writes()
            self._batches = self.source.guest.batches()
        if self.case.mode in ('background-snapshot', 'savevm'):
            # Of a guest that never ran QEMU cannot make one, and aborts
            self.source.qemu.qmp('cont')
            self.source.qemu.qmp('stop')
        if self.case.mode == 'savevm':
            self._internal_snapshot()
            return
        if self.case.to_file:
            self._start(self._file_address('source'))
            self._follow_source()
            self._incoming(self._file_address('destination'))
        else:
            self._start(self._listen())
            self._follow_source()
        self._follow_destination()

    # Addresses

    def _incoming(self, uri: str) -> None:
        self._say(f'destination: migrate-incoming {uri}')
        self.destination.qemu.qmp('migrate-incoming', uri=uri)

    def _listen(self) -> str:
        if self.case.transport == 'fd':
            ends = socket.socketpair()
            for machine, end in zip((self.source, self.destination), ends):
                machine.qemu.send_fd('migration', end.fileno())
                end.close()
            self._incoming('fd:migration')
            return 'fd:migration'
        uri = (f'unix:{self._directory}/migration'
               if self.case.transport == 'unix' else TCP)
        self._say(f'destination: migrate-incoming {uri}')
        return listen(self.destination.qemu, uri)

    def _file_address(self, name: str) -> str:
        path = f'{self._directory}/stream'
        if self.case.transport == 'exec':
            return ('exec:cat > ' if name == 'source' else 'exec:cat ') + path
        if self.case.transport == 'fd':
            flags = (os.O_CREAT | os.O_WRONLY if name == 'source'
                     else os.O_RDONLY)
            fd = os.open(path, flags | os.O_CLOEXEC)
            getattr(self, name).qemu.send_fd('migration', fd)
            os.close(fd)
            return 'fd:migration'
        offset = ',offset=0x3000' if self.case.transport == 'file-offset' \
            else ''
        return f'file:{path}{offset}'

    # An internal snapshot

    def _internal_snapshot(self) -> None:
        image = {'driver': 'file', 'filename': f'{self._directory}/disk'}
        source, destination = self.source.qemu, self.destination.qemu
        creations: Tuple[Dict[str, Any], ...] = (
            {**image, 'size': 0},
            {'driver': 'qcow2', 'file': image, 'size': MIB})
        for options in creations:
            run_job(source, 'blockdev-create', options=options)
        disk = {'driver': 'qcow2', 'node-name': _DISK, 'file': image}
        for qemu, command in ((source, 'snapshot-save'),
                              (destination, 'snapshot-load')):
            qemu.qmp('blockdev-add', **disk)
            self._say(f'{qemu.name}: {command}')
            run_job(qemu, command, tag=_TAG, vmstate=_DISK, devices=[_DISK])
            # Else it is locked, or what is cached of it is old
            qemu.qmp('blockdev-del', **{'node-name': _DISK})
        self._hand_over()

    # The source

    def _start(self, uri: str) -> None:
        # Nothing to be done meanwhile needs no time
        hurry = (not self.case.dirty and self.case.switch is None
                 and self._rng.randrange(4))
        self._set(self.source, 'max-bandwidth',
                  _FAST if hurry else self.case.bandwidth)
        self._say(f'source: migrate {uri}')
        self._started = time.monotonic()
        self.source.qemu.qmp('migrate', uri=uri)

    def _set(self, machine: Machine, name: str, value: Any) -> None:
        self._say(f'{machine.name}: {name}={value}')
        machine.qemu.qmp('migrate-set-parameters', **{name: value})

    def _once(self, what: str) -> bool:
        """True when asked for the first time."""
        if what in self._done:
            return False
        self._done.append(what)
        return True

    def _follow_source(self) -> None:
        last = ''
        while True:
            info = self.source.qemu.query_migrate()
            status = info['status']
            if status != last:
                self._say(f'source is {status}')
                last = status
            if status == 'completed':
                break
            if status in ('failed', 'cancelled'):
                raise MigrationFailed(
                    f'source: {status}: {info.get("error-desc")}')
            self._act(info)
            time.sleep(_POLL)
        if not self.source.guest:
            self._say(f'ram: {info["ram"]}')

    def _act(self, info: Dict[str, Any]) -> None:
        """What is to be done in this state of the source."""
        status = info['status']
        if status == 'active':
            self._while_active(info['ram']['dirty-sync-count'])
        elif status == 'pre-switchover' and self._once('continue'):
            self._write(self._rng.randrange(8))
            self.source.qemu.qmp('migrate-continue', state='pre-switchover')
        elif status == 'postcopy-active':
            self._while_postcopy()

    def _while_active(self, syncs: int) -> None:
        case = self.case
        if case.switch is not None and \
                time.monotonic() - self._started > case.switch / 1000 and \
                self._once('switch'):
            self._say('source: migrate-start-postcopy')
            self.source.qemu.qmp('migrate-start-postcopy')
            return
        if self._pending:
            self._write(self._rng.randrange(1, 16))
            self._pending -= 1
            if self._rng.randrange(3) == 0:
                self._set(self.source, 'max-bandwidth', _FAST)
        elif self.source.guest:
            self._let_guest_write(syncs)
        elif (case.switch is None or 'switch' in self._done) and \
                self._once('hurry'):
            self._set(self.source, 'max-bandwidth', _FAST)

    def _let_guest_write(self, syncs: int) -> None:
        """Hurry when it has; not waiting, as the migration may end first.

        syncs: how often the dirty bitmap was synced.
        """
        guest = self.source.guest
        assert guest
        if guest.batches() == self._batches:
            return
        if self._once('hurry'):
            self._set(self.source, 'max-bandwidth', _FAST)
        # On a busy machine it could go on for ever
        if syncs > self._rounds and self._once('converge'):
            self._set(self.source, 'downtime-limit', 60000)

    def _write(self, count: int) -> None:
        """Write count times, to the source; nothing if nobody may."""
        if self.case.dirty != 'qtest':
            return
        for _ in range(count):
            self._write_once(self.source)

    def _write_once(self, machine: Machine) -> None:
        rng = self._rng
        kind = rng.randrange(4)
        if kind == 0:       # a page becomes zero, or a hole is populated
            number, offset = machine.random_place(rng, PAGE)
            data = bytes(PAGE)
        elif kind == 1:
            number, offset = machine.random_place(rng, PAGE)
            data = rng.randbytes(PAGE)
        else:
            number, offset = machine.random_place(rng, 8)
            data = struct.pack('<Q', rng.getrandbits(64))
        machine.guest_write(number, offset, data)

    # The destination

    def _while_postcopy(self) -> None:
        state = self.destination.qemu.query_migrate().get('status')
        if state != 'postcopy-active' or not self._once('accesses'):
            return
        if self.destination.guest:
            self.destination.guest.wait_until_it_writes()
        else:
            # What comes now is its own
            self._hand_over()
            for _ in range(self._accesses):
                if self._rng.randrange(3):
                    number, offset = self.destination.random_place(self._rng,
                                                                   16)
                    self.destination.guest_read(number, offset, 16)
                else:
                    self._write_once(self.destination)
        self._set(self.source, 'max-postcopy-bandwidth', 0)

    def _hand_over(self) -> None:
        """The destination has to have what the source had at its end."""
        if self._once('handed over'):
            self.destination.models = [model.copy()
                                       for model in self.source.models]

    def _follow_destination(self) -> None:
        while True:
            info = self.destination.qemu.query_migrate()
            status = info.get('status')
            if status == 'completed' and \
                    self.destination.qemu.status() != 'inmigrate':
                break
            if status in ('failed', 'cancelled'):
                raise MigrationFailed(
                    f'destination: {status}: {info.get("error-desc")}')
            time.sleep(_POLL)
        self._say('destination is completed')
        self._hand_over()


# Looking at what it left

class Check:
    """Compares both sides with the models, after the migration."""

    def __init__(self, case: Case, source: Machine, destination: Machine):
        self.case = case
        self.source = source
        self.destination = destination
        self.complaints: List[str] = []

    def run(self) -> None:
        """Raises Wrong, which says all that is wrong."""
        for machine in (self.source, self.destination):
            if machine.guest:
                machine.qemu.qmp('stop')
                machine.guest.apply(machine.blocks[0], machine.models[0])
        # Reading populates private mappings, so that comes afterwards
        for number, block in enumerate(self.case.blocks):
            self._source_allocation(number, block)
            self._destination_allocation(number, block)
        for number in range(len(self.case.blocks)):
            self._content(self.source, number)
            self._content(self.destination, number)
        for machine in (self.source, self.destination):
            machine.check_around()
        if self.complaints:
            raise Wrong('\n'.join(self.complaints))
        if self.destination.guest:
            self.destination.guest.check_itself(self.destination.qemu,
                                                self.destination.qtest)

    def _source_allocation(self, number: int, block: Block) -> None:
        machine = self.source
        allowed = allowed_on_source(
            machine.before[number], machine.models[number].written,
            not source_reads(self.case, block))
        self._allocation(machine, number, allowed)

    def _destination_allocation(self, number: int, block: Block) -> None:
        machine = self.destination
        allowed = allowed_on_destination(
            machine.models[number], machine.before[number],
            policy(self.case, block))
        if allowed is not None and policy(self.case, block) == 'keep':
            # What the source had at some time may have arrived
            allowed = union(allowed, self.source.models[number].ever)
        self._allocation(machine, number, allowed)

    def _allocation(self, machine: Machine, number: int,
                    allowed: Optional[bytearray]) -> None:
        block = machine.blocks[number]
        if allowed is None:
            return
        if machine.guest:
            machine.guest.allow(allowed)
        name = f'{machine.name}, block {number}'
        if block.huge:
            units = sum(in_units(allowed, THP // PAGE)) * PAGE
            units = max(units, machine.allocated_before[number]
                        if machine.name == 'source' else 0)
            allocated = block.allocated() or 0
            if allocated > units:
                self.complaints.append(
                    f'{name} has {allocated // MIB} MiB of huge '
                    f'pages, and no more than {units // MIB} MiB are needed')
            return
        if self.case.thp:
            allowed = _around_huge(block, allowed)
        pages = populated(block)
        assert pages is not None
        extra = minus(pages, allowed)
        if extra:
            self.complaints.append(
                f'{name}: {some(extra)} are populated for nothing; '
                f'{sum(pages)} of {len(pages)} pages are populated, '
                f'{sum(machine.before[number])} were before')

    def _released(self, machine: Machine, number: int) -> List[bytes]:
        """What pages of the source may have after release-ram.

        Of a private mapping, some are not punched in the file, and then read
        as they did when they were there only.
        """
        if machine.name != 'source' or \
                'release-ram' not in self.case.source.capabilities:
            return []
        return [bytes(machine.blocks[number].size),
                machine.initial(number).content]

    def _content(self, machine: Machine, number: int) -> None:
        wrong = machine.models[number].differing(
            machine.blocks[number].read(), self._released(machine, number))
        if machine.guest:
            wrong = [page for page in wrong
                     if not machine.guest.is_its_own(page)]
        if wrong:
            self.complaints.append(f'{machine.name}, block {number}: '
                                   f'{some(wrong)} do not have the content '
                                   'that they have to have')


def _around_huge(block: Ram, allowed: bytes) -> bytearray:
    """A transparent huge page is populated as a whole.

    That of a file has to be aligned in the file, that of anonymous memory in
    the address space; of a private mapping of a file it may be either.
    """
    by_address = in_units(allowed, THP // PAGE, block.address % THP // PAGE)
    if block.path is None:
        return by_address
    by_offset = in_units(allowed, THP // PAGE, block.file_offset % THP // PAGE)
    return by_offset if block.shared else union(by_address, by_offset)


# All together

def _describe(error: BaseException) -> str:
    if isinstance(error, (Wrong, MigrationFailed, GuestError)):
        return str(error)
    return ''.join(traceback.format_exception(error)).rstrip()


def _last_words(machine: Machine) -> str:
    """How far QEMU got, and all that it printed."""
    qemu = machine.qemu
    if qemu.pid < 0:
        return f'{machine.name}: did not start'
    try:
        info = qemu.query_migrate()
        state = {key: info[key] for key in ('status', 'error-desc')
                 if key in info}
    except (GuestError, OSError, AttributeError) as err:
        state = {'gone': str(err)}
    printed = qemu.end().strip()
    return '\n'.join([f'{machine.name}: {state}',
                      *(f'    {line}' for line in printed.splitlines())])


def _run(case: Case, setup: Setup) -> None:
    with ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix='random-'))
        _require(case, directory, stack)
        source = Machine('source', case, case.source, setup, directory)
        destination = Machine('destination', case, case.destination, setup,
                              directory)
        try:
            stack.enter_context(source.started())
            stack.enter_context(destination.started())
            with watched((source.qemu, destination.qemu),
                         min(setup.floor, available() // 2), TIMEOUT):
                Migration(case, source, destination, setup, directory).run()
                Check(case, source, destination).run()
        except Exception as err:
            raise Wrong('\n'.join([
                _describe(err), _last_words(source),
                _last_words(destination)])) from err


def _without_sparse_ram(case: Case) -> Case:
    """A stock QEMU would not start to migrate, which would show nothing."""
    def side(each: Side) -> Side:
        return replace(each, capabilities=tuple(
            name for name in each.capabilities if name != 'sparse-ram'))

    return replace(case, source=side(case.source),
                   destination=side(case.destination))


def run_case(case: Case, setup: Setup) -> Outcome:
    """Run a case from start to end; nothing is left behind."""
    began = time.monotonic()
    if setup.sabotage == 'stock-destination':
        case = _without_sparse_ram(case)

    def outcome(status: str, text: str = '') -> Outcome:
        return Outcome(f'seed {case.seed}: {case.mode} by {case.transport}',
                       status, text, time.monotonic() - began)

    try:
        _run(case, setup)
    except Unavailable as err:
        return outcome(SKIPPED, str(err))
    except (Wrong, UserError) as err:
        return outcome(FAILED, str(err))
    return outcome(PASSED)
