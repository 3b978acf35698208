# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a random migration, and compare what came of it with the model."""

import os
import random
import resource
import socket
import struct
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Dict, List, Optional

from lab import UserError, host
from lab.memory import MIB, available
from lab.migrate import MigrationFailed, create_qcow2, listen, run_job, watched
from lab.modes import TCP
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, Unavailable, Wrong
from lab.qemu import GuestError
from lab.ram import Ram
from lab.random.case import Case, Side, policy, source_reads
from lab.random.machine import TIMEOUT, Machine, Memory, Setup
from lab.random.model import (PAGE, THP, allowed_on_destination,
                              allowed_on_source, in_units, minus, some, union)

_FAST = 8 << 30                 # bytes a second: no limit
_POLL = 0.002                   # seconds

# What a QEMU may take if all of it is locked
_LOCKED = 1 << 30

# The disk that has an internal snapshot, and the snapshot's tag
_DISK = 'disk0'
_TAG = 'random'


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
    if case.source.parameters.get('direct-io') and not host.direct_io_works(directory):
        raise Unavailable(f'no O_DIRECT in {os.path.dirname(directory)} '
                          '(set TMPDIR)')
    if any(side.locked for side in (case.source, case.destination)) and \
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < _LOCKED and \
            os.geteuid():
        raise Unavailable(f'no more than {_LOCKED // MIB} MiB of memory can '
                          'be locked (ulimit -l)')
    if case.postcopy or case.mode == 'background-snapshot':
        host.require_userfaultfd()


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
        self._pending = (self._rng.randrange(1, 12) if case.dirty == 'qtest' else 0)
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
            flags = (os.O_CREAT | os.O_WRONLY if name == 'source' else os.O_RDONLY)
            fd = os.open(path, flags | os.O_CLOEXEC)
            getattr(self, name).qemu.send_fd('migration', fd)
            os.close(fd)
            return 'fd:migration'
        offset = ',offset=0x3000' if self.case.transport == 'file-offset' else ''
        return f'file:{path}{offset}'

    # An internal snapshot

    def _internal_snapshot(self) -> None:
        source, destination = self.source.qemu, self.destination.qemu
        image = create_qcow2(source, f'{self._directory}/disk', MIB)
        for qemu, command in ((source, 'snapshot-save'),
                              (destination, 'snapshot-load')):
            qemu.qmp('blockdev-add', **image, **{'node-name': _DISK})
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
        self._set(self.source, 'max-bandwidth', _FAST if hurry else self.case.bandwidth)
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
                raise MigrationFailed(f'source: {status}: {info.get("error-desc")}')
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
        elif (case.switch is None or 'switch' in self._done) and self._once('hurry'):
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
            block, offset = machine.random_place(rng, PAGE)
            data = bytes(PAGE)
        elif kind == 1:
            block, offset = machine.random_place(rng, PAGE)
            data = rng.randbytes(PAGE)
        else:
            block, offset = machine.random_place(rng, 8)
            data = struct.pack('<Q', rng.getrandbits(64))
        machine.guest_write(block, offset, data)

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
                    block, offset = self.destination.random_place(self._rng, 16)
                    self.destination.guest_read(block, offset, 16)
                else:
                    self._write_once(self.destination)
        self._set(self.source, 'max-postcopy-bandwidth', 0)

    def _hand_over(self) -> None:
        """The destination has to have what the source had at its end."""
        if self._once('handed over'):
            for block, sent in zip(self.destination.blocks, self.source.blocks):
                block.model = sent.model.copy()

    def _follow_destination(self) -> None:
        while True:
            info = self.destination.qemu.query_migrate()
            status = info.get('status')
            if status == 'completed' and self.destination.qemu.status() != 'inmigrate':
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
        machines = self.source, self.destination
        for machine in machines:
            if machine.guest:
                machine.qemu.qmp('stop')
                machine.guest.apply(machine.blocks[0].ram, machine.blocks[0].model)
        # Reading populates private mappings, so that comes afterwards
        for sent, block in zip(self.source.blocks, self.destination.blocks):
            self._source_allocation(sent)
            self._destination_allocation(block, sent)
        for blocks in zip(self.source.blocks, self.destination.blocks):
            for machine, block in zip(machines, blocks):
                self._content(machine, block)
        for machine in machines:
            for block in machine.blocks:
                block.check_around()
        if self.complaints:
            raise Wrong('\n'.join(self.complaints))
        if self.destination.guest:
            self.destination.guest.check_itself(self.destination.qemu,
                                                self.destination.qtest)

    def _source_allocation(self, block: Memory) -> None:
        allowed = allowed_on_source(block.before, block.model.written,
                                    not source_reads(self.case, block.spec))
        # It keeps the huge pages that it had
        self._allocation(self.source, block, allowed, block.allocated_before)

    def _destination_allocation(self, block: Memory, sent: Memory) -> None:
        kept = policy(self.case, block.spec)
        allowed = allowed_on_destination(block.model, block.before, kept)
        if allowed is not None and kept == 'keep':
            # What the source had at some time may have arrived
            allowed = union(allowed, sent.model.ever)
        self._allocation(self.destination, block, allowed)

    def _allocation(self, machine: Machine, block: Memory,
                    allowed: Optional[bytearray], least: int = 0) -> None:
        """least: bytes of huge pages that are allowed in any case."""
        if allowed is None:
            return
        if machine.guest:
            machine.guest.allow(allowed)
        pages = block.populated()
        if pages is None:
            units = max(sum(in_units(allowed, THP // PAGE)) * PAGE, least)
            allocated = block.ram.allocated() or 0
            if allocated > units:
                self.complaints.append(
                    f'{block.name} has {allocated // MIB} MiB of huge '
                    f'pages, and no more than {units // MIB} MiB are needed')
            return
        if self.case.thp:
            allowed = _around_huge(block.ram, allowed)
        extra = minus(pages, allowed)
        if extra:
            self.complaints.append(
                f'{block.name}: {some(extra)} are populated for nothing; '
                f'{sum(pages)} of {len(pages)} pages are populated, '
                f'{sum(block.before)} were before')

    def _content(self, machine: Machine, block: Memory) -> None:
        others: List[bytes] = []
        if machine is self.source and 'release-ram' in self.case.source.capabilities:
            # What was sent is zero.  Of a private mapping, some pages are not
            # punched in the file, and then read as they did when they were there
            # only.
            others = [bytes(block.size), block.initial().content]
        wrong = block.model.differing(block.ram.read(), others)
        if machine.guest:
            wrong = [page for page in wrong if not machine.guest.is_its_own(page)]
        if wrong:
            self.complaints.append(f'{block.name}: {some(wrong)} do not have '
                                   'the content that they have to have')


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
        state = {key: info[key] for key in ('status', 'error-desc') if key in info}
    except (GuestError, OSError, AttributeError) as err:
        state = {'gone': str(err)}
    printed = qemu.end().strip()
    return '\n'.join([f'{machine.name}: {state}',
                      *(f'    {line}' for line in printed.splitlines())])


def _run(case: Case, setup: Setup) -> None:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix='random-'))
        _require(case, directory, stack)
        source = Machine('source', case, case.source, setup, directory)
        destination = Machine('destination', case, case.destination, setup, directory)
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

    return replace(case, source=side(case.source), destination=side(case.destination))


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
