# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate between the patched QEMU and QEMUs without the patches.

Those are the stock QEMU of the same version, and Debian 12's QEMU 7.2 (see
scripts/get-old-qemu), each as the source and as the destination.  All bytes of
guest RAM are compared, and the patched side must have no more allocated than
what it had before and what has data; what the other side has is its own affair.
The patched destination starts with other data in its RAM.

Output is TAP.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from lab import content, host
from lab.base import BUILD
from lab.ci.cases import Case, add_arguments, run_cases
from lab.cli import memory_floor, ready, run_main
from lab.measure.operation import Migrate, Session
from lab.memory import MIB, PAGE_SIZE
from lab.migrate import (MigrationFailed, clear_capabilities, configure, settle,
                         watched)
from lab.modes import MODES, MULTIFD, POSTCOPY, PRECOPY, PREEMPT, Mode
from lab.outcome import Unavailable, Wrong, expect
from lab.qemu import Guest, GuestError, pick_accelerator
from lab.qtest_client import Qtest
from lab.ram import KINDS, Extent, Ram, without

SIZE = 128 * MIB
SEED = 7                        # of what is in the source's RAM
OLD_SEED = 8                    # of what was in the destination's
TIMEOUT = 240.0                 # seconds, for what takes a few
# Of a migration that RAM is written to meanwhile: where this process gets no
# processor time for long enough, QEMU finds nothing that is dirty
TRIES = 5

PATCHED, STOCK, OLD = 'patched', 'stock', '7.2'

# Seconds that a guest has to run for on the destination
RUN_TIME = 0.3


class EndedTooSoon(Exception):
    """The migration did not wait for a Writer; says how it is."""


class Writer:
    """Writes into the source's RAM while it is migrated, as the guest would.

    Through qtest, which marks what it writes to as dirty.  Goes on until there
    were some rounds of the migration, and then lets it end.

    touched: the pages that were written to.
    """
    ROUNDS = 5
    # Written to each time, a few bytes of it: for xbzrle
    HOT_PAGES = 20
    OTHER_PAGES = 200
    # QEMU ends by itself if hardly a page is dirty when a round has ended.  So most
    # of RAM is sent fast, but then each tenth of a second has room for less
    # data than is made dirty meanwhile.
    FAST, SLOW = 24 * MIB, 1 * MIB      # bytes per second
    FAST_UNTIL = 12 * MIB               # that are left
    PARAMETERS = {'max_bandwidth': FAST, 'downtime_limit': 1}

    def __init__(self, path: str, xbzrle: bool):
        """path: for the socket of qtest."""
        self._qtest = Qtest(path)
        self._xbzrle = xbzrle
        self._fast = True
        self._rng = random.Random(SEED)
        # Above what is not RAM on a PC
        pages = range(MIB, SIZE, PAGE_SIZE)
        self._hot = self._rng.sample(pages, self.HOT_PAGES)
        self._others = self._rng.sample(pages, self.OTHER_PAGES)
        self.touched: Set[int] = set(self._hot)

    def arguments(self) -> Sequence[str]:
        """For the source's command line."""
        return self._qtest.arguments

    def _write(self) -> None:
        """Change all hot pages, and some of the others."""
        qtest = self._qtest
        for page in self._hot:
            where = page + self._rng.randrange(PAGE_SIZE)
            qtest.write(where, bytes([self._rng.randrange(256)]))
        for page in self._rng.sample(self._others, self.OTHER_PAGES // 4):
            self.touched.add(page)
            if self._rng.random() < 0.3:
                qtest.write(page, bytes(PAGE_SIZE))
            else:
                qtest.write(page, content.page(self._rng))

    def _look(self, source: Guest) -> bool:
        """Whether there were enough rounds."""
        info = source.query_migrate()
        if info['status'] == 'setup':
            return False
        if info['status'] != 'active':
            raise EndedTooSoon(info['status'])
        ram = info['ram']
        if self._fast and ram['remaining'] < self.FAST_UNTIL:
            self._fast = False
            source.qmp('migrate-set-parameters', **{'max-bandwidth': self.SLOW})
        return (ram['dirty-sync-count'] > self.ROUNDS
                and not (self._xbzrle and not info['xbzrle-cache']['pages']))

    def __call__(self, session: Session) -> None:
        with self._qtest:
            while not self._look(session.source):
                self._write()
                # Raises if there is something wrong
                session.wait_until(lambda: not session.watchdog.tripped)
        session.source.qmp('migrate-set-parameters', **{'max-bandwidth': 1 << 40})


@dataclass(frozen=True)
class Way:
    """A mode, and what is done meanwhile.

    old: whether QEMU 7.2 has the mode.
    writes: whether RAM changes meanwhile.
    running: whether the guest runs before and afterwards.
    backends: of the patched side and of the other; modes that QEMU has for
    all kinds of RAM are tried with more of them.
    """
    name: str
    mode: Mode
    old: bool = True
    writes: bool = False
    running: bool = False
    quick: bool = False
    backends: Tuple[str, str] = ('memfd', 'memfd')


_MULTIFD = MULTIFD.also(multifd_channels=4)
# To start it and to switch it to postcopy are two commands: between them, precopy
# must not come to its end.  Postcopy has a limit of its own, which is none.
_POSTCOPY = POSTCOPY.also(max_bandwidth=MIB)

# With a stopped guest, xbzrle has nothing to do in the second round
WAYS = (
    Way('precopy', PRECOPY, quick=True),
    Way('precopy-writes', PRECOPY, writes=True),
    Way('precopy-running', PRECOPY, running=True, quick=True),
    Way('xbzrle-writes', MODES['xbzrle'], writes=True, quick=True),
    Way('multifd', _MULTIFD, quick=True),
    Way('multifd-writes', _MULTIFD, writes=True, quick=True),
    Way('multifd-zlib', MODES['multifd-zlib']),
    Way('multifd-zstd', MODES['multifd-zstd']),
    Way('multifd-legacy', MODES['multifd-legacy'], old=False),
    Way('postcopy', _POSTCOPY, quick=True),
    Way('postcopy-running', _POSTCOPY, running=True),
    Way('postcopy-preempt', PREEMPT.also(max_bandwidth=MIB)),
    Way('exec', MODES['exec']),
    Way('file', MODES['file'], old=False, quick=True),
    Way('mapped-ram', MODES['mapped-ram'], old=False, quick=True),
    Way('mapped-ram-multifd', MODES['mapped-ram-multifd'], old=False))

# With other memory backends
BACKEND_WAYS = tuple(
    replace(way, name=f'{way.name}-{ours}-{theirs}', quick=False,
            backends=(ours, theirs))
    for way in WAYS if way.name in ('precopy', 'multifd', 'postcopy')
    for ours, theirs in (('memfd', 'anonymous'), ('shm-directory', 'memfd')))

# The machine types that all of them have, and the newest
OLD_MACHINES = 'pc-q35-7.2', 'pc-i440fx-7.2'
NEW_MACHINE = 'q35'


@dataclass
class Rig:
    """What to run the cases with.

    binaries: by name; no_old: why there is no QEMU 7.2.
    """
    binaries: Dict[str, str]
    no_old: str
    accel: str
    extra_args: Tuple[str, ...]
    guests: List[Guest] = field(default_factory=list)

    def guest(self, name: str, qemu: str, machine: str, **more: Any) -> Guest:
        """A guest that was not started yet."""
        if qemu == OLD and self.no_old:
            raise Unavailable(self.no_old)
        args = more.pop('extra_args', ())
        return Guest(name, self.binaries[qemu], SIZE, accel=self.accel,
                     extra_args=('-machine', machine, *self.extra_args, *args),
                     **more)


def _outside(ram: Ram, allowed: Sequence[Extent]) -> str:
    """Where RAM is populated and may not be, for people: the first places."""
    return ', '.join(f'{start:#x}-{end:#x}' for start, end
                     in islice(without(ram.extents(), allowed), 5))


def check_allocation(side: str, ram: Ram, allowed: Sequence[Extent]) -> None:
    """Whether all that is allocated lies in the allowed extents."""
    most = content.total(content.round_out(allowed, host.shmem_unit()))
    allocated = ram.allocated()
    assert allocated is not None
    expect(allocated <= most,
           f'the {side} has {allocated >> 10} KiB allocated, and may have '
           f'{most >> 10} KiB: {_outside(ram, allowed)}')


def check_content(source: Guest, destination: Guest) -> None:
    """Whether all bytes are the same."""
    compared = content.compare(source.ram, destination.ram)
    expect(compared.bytes_nonzero > 0, 'there is no data in guest RAM')
    expect(compared.identical, str(compared))


def check_runs(guest: Guest) -> None:
    """Whether the guest can go on."""
    guest.qmp('cont')
    time.sleep(RUN_TIME)
    status = guest.status()
    expect(status == 'running', f'on the destination, the guest is {status}')


def migrate(rig: Rig, pair: Tuple[str, str], machine: str, way: Way) -> None:
    """One case: from pair[0] to pair[1]."""
    for _ in range(TRIES):
        try:
            migrate_once(rig, pair, machine, way)
            return
        except EndedTooSoon as err:
            print(f'# {err} before there were {Writer.ROUNDS} rounds: again')
    raise Wrong(f'no migration of {TRIES} lasted for {Writer.ROUNDS} rounds')


def migrate_once(rig: Rig, pair: Tuple[str, str], machine: str, way: Way) -> None:
    """The same, once; raises EndedTooSoon."""
    ours, theirs = way.backends
    backends = [ours if qemu == PATCHED else theirs for qemu in pair]
    mode = way.mode
    if mode.postcopy:
        host.require_userfaultfd(by_device=pair[1] != OLD)
    if 'shm-directory' in backends:
        host.require_shm(SIZE)
    with ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix='old-and-new-'))
        extra: Sequence[str] = ()
        writer: Optional[Writer] = None
        if way.writes:
            writer = Writer(os.path.join(directory, 'qtest'),
                            'xbzrle' in mode.capabilities)
            extra = writer.arguments()
            mode = mode.also(**Writer.PARAMETERS)
        source = stack.enter_context(rig.guest(
            'source', pair[0], machine, backend=backends[0],
            paused=not way.running, extra_args=extra))
        destination = stack.enter_context(rig.guest(
            'destination', pair[1], machine, backend=backends[1],
            paused=True, incoming=True))
        watchdog = stack.enter_context(
            watched((source, destination), memory_floor(), TIMEOUT))

        if way.running:
            settle(source)
            content.write_data(source.ram, SIZE // 8)
        else:
            content.write(source.ram, SEED)
        if pair[1] == PATCHED:
            content.write(destination.ram, OLD_SEED)
        before = list(source.ram.extents())
        kept = ([] if KINDS[backends[1]].is_freed else list(destination.ram.extents()))

        Migrate(mode, writer).run(Session(source, destination, watchdog, directory))

        check_content(source, destination)
        if pair[0] == PATCHED:
            side, ram, allowed = 'source', source.ram, before
        else:
            side, ram = 'destination', destination.ram
            allowed = [*content.nonzero(source.ram), *kept]
        if way.running:
            # Firmware uses it on the source, and devices on the destination.
            # On a slow machine, firmware may not be done when it seems so.
            allowed = [*allowed, (0, MIB), *content.nonzero(source.ram)]
        if writer and pair[0] == PATCHED:
            allowed = [*allowed, *((page, page + PAGE_SIZE) for page in writer.touched)]
        check_allocation(side, ram, allowed)
        if way.running:
            check_runs(destination)


def refuse(rig: Rig, qemu: str, machine: str) -> None:
    """A destination without sparse-ram refuses it, and nothing is lost."""
    with ExitStack() as stack:
        source = stack.enter_context(rig.guest('source', PATCHED, machine, paused=True))
        content.write(source.ram, SEED)
        before = list(source.ram.extents())
        for capabilities, good in ((('sparse-ram',), False), ((), True)):
            destination = stack.enter_context(rig.guest(
                'destination', qemu, machine, paused=True, incoming=True))
            with watched((source, destination), memory_floor(), TIMEOUT) as watchdog:
                configure(source, capabilities, {})
                try:
                    Migrate().run(Session(source, destination, watchdog, ''))
                    expect(good, 'sparse-ram was not refused')
                except (MigrationFailed, GuestError):
                    if good:
                        raise
            if not good:
                status = source.status()
                expect(status in ('prelaunch', 'paused'), f'the source is {status}')
                clear_capabilities(source)
        check_content(source, destination)
        check_allocation('source', source.ram, before)


def all_cases(rig: Rig) -> Iterator[Case]:
    """Every direction, machine type and mode that fit together."""
    for other in (STOCK, OLD):
        machines: Tuple[str, ...] = OLD_MACHINES
        if other == STOCK:
            machines = (NEW_MACHINE, *OLD_MACHINES)
        for pair in ((other, PATCHED), (PATCHED, other)):
            for machine in machines:
                for way in WAYS + BACKEND_WAYS:
                    if other == OLD and not way.old:
                        continue
                    yield Case(
                        f'{pair[0]}-to-{pair[1]}/{machine}/{way.name}',
                        partial(migrate, rig, pair, machine, way),
                        way.quick and machine == NEW_MACHINE)
        yield Case(f'{PATCHED}-to-{other}/{machines[0]}/sparse-ram-refused',
                   partial(refuse, rig, other, machines[0]), other == STOCK)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python3 -m lab.oldnew',
        description=(__doc__ or '').split('\n\n', maxsplit=1)[0])
    add_arguments(parser)
    parser.add_argument('--old', metavar='FILE',
                        default=f'{BUILD}/qemu-7.2/qemu-system-x86_64',
                        help="Debian 12's QEMU 7.2")
    parser.add_argument('--no-old', metavar='REASON', default='',
                        help='why there is none; its cases are skipped')
    return parser.parse_args()


def run() -> int:
    """Returns the exit status."""
    args = parse_args()
    ready(args)
    no_old = args.no_old
    if not no_old and not os.access(args.old, os.X_OK):
        no_old = f"there is no {args.old}: run scripts/get-old-qemu first"
    rig = Rig({PATCHED: args.patched, STOCK: args.stock, OLD: args.old},
              no_old, args.accel or pick_accelerator(),
              tuple(args.qemu_args))
    return run_cases(list(all_cases(rig)), args)


if __name__ == '__main__':
    sys.exit(run_main('old-and-new', run))
