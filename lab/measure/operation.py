# SPDX-License-Identifier: GPL-2.0-or-later
"""One operation that reads all of a guest's RAM, measured.

Each kind of operation is a small class whose run() does it; measure() starts
the guests, prepares RAM, and looks at what came of it.
"""

import os
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from lab import content
from lab.measure.ping import Pinger
from lab.memory import GIB, MIB, PAGE_SIZE
from lab.migrate import (MigrationAborted, MigrationFailed, Watchdog,
                         configure, create_qcow2, listen, run_job, watched,
                         why_failed)
from lab.modes import PRECOPY, Mode
from lab.qemu import Guest
from lab.qtest_client import Qtest
from lab.ram import KINDS, Ram, Sample, reset_rss_peak

# Seconds between two looks at how far it is
_POLL_INTERVAL = 0.02

# No limit that could hide a cost (max-postcopy-bandwidth has none by default)
_BANDWIDTH = 1 << 40            # bytes per second

# Of the pages that are written to at the switchover, the first one: below it a
# PC has ROM
_FIRST_DIRTY = 1 * MIB // PAGE_SIZE


@dataclass
class Session:
    """The guests of one measurement, ready for the operation.

    destination: None if the operation has no use for one.
    directory: for temporary files; removed afterwards.
    """
    source: Guest
    destination: Optional[Guest]
    watchdog: Watchdog
    directory: str

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Poll; raises MigrationAborted when the watchdog says so."""
        while not done():
            if self.watchdog.tripped:
                # Also ends what has to be cancelled: the guests are killed
                raise MigrationAborted(self.watchdog.tripped)
            time.sleep(_POLL_INTERVAL)


@dataclass(frozen=True)
class Times:
    """How long an operation took, in seconds.

    total: as QEMU says it, or else wall.
    wall: on our own clock, from the command until both sides are done.
    load: until a guest has read the file that was written; of a migration
    file, as the destination's events say it.
    ram: statistics of the source, as query-migrate names them.
    downtime: from the source's event that it begins to save the devices to the
    destination's that all is there; with postcopy, as the source says it.
    """
    total: float
    wall: float
    load: Optional[float] = None
    ram: Dict[str, Any] = field(default_factory=dict)
    downtime: Optional[float] = None


class Operation:
    """Something to do with a guest.

    loads: whether a second guest has the first one's RAM afterwards.
    """
    loads = False

    @property
    def must_have_run(self) -> bool:
        """Whether QEMU cannot do it to a guest that never ran."""
        return False

    def run(self, session: Session) -> Times:
        """Do it, wait until it is done."""
        raise NotImplementedError

    def file_size(self, size: int) -> int:
        """Bytes that a guest of this size may need of the directory: with every page
        as data, which is what mapped-ram may come to.
        """
        return size + size // 64


def wait_for_migration(session: Session, guest: Guest) -> Dict[str, Any]:
    """Wait until a side has completed; returns its query-migrate."""
    info: Dict[str, Any] = {}

    def done() -> bool:
        info.clear()
        info.update(guest.query_migrate())
        if info.get('status') in ('failed', 'cancelled', 'postcopy-paused'):
            raise MigrationFailed(why_failed(session.destination or guest, info))
        return info.get('status') == 'completed'

    session.wait_until(done)
    return info


def _times(session: Session, guest: Guest) -> Dict[str, float]:
    """When the migration got where; only after it has completed."""
    times: Dict[str, float] = {}

    def complete() -> bool:
        guest.status()      # reads events, too
        times.update(guest.migration_times())
        return 'completed' in times

    session.wait_until(complete)
    return times


def dirty_pages(size: int, percent: int) -> List[int]:
    """Numbers of so many pages of RAM, at random, always the same ones."""
    pages = range(_FIRST_DIRTY, size // PAGE_SIZE)
    return sorted(random.Random(0).sample(pages, len(pages) * percent // 100))


def write_by_qtest(guest: Guest, pages: List[int]) -> None:
    """Write to pages of a guest that does not run, and let QEMU notice."""
    with tempfile.TemporaryDirectory(prefix='sparse-ram-') as directory:
        path = os.path.join(directory, 'qtest')
        guest.qmp('chardev-add', id='qtest', backend={
            'type': 'socket', 'data': {
                'addr': {'type': 'unix', 'data': {'path': path}},
                'server': True, 'wait': False}})
        guest.qmp('object-add', id='qtest-server', chardev='qtest',
                  **{'qom-type': 'qtest', 'log': '/dev/null'})
        with Qtest(path) as qtest:
            qtest.commands([
                f'write {page * PAGE_SIZE:#x} 0x8 {~page & (1 << 64) - 1:#018x}'
                for page in pages])


@dataclass(frozen=True)
class Migrate(Operation):
    """A migration from the source to the destination: through loopback, or to a
    file, which the destination then loads.

    Postcopy is switched to as soon as it has started.
    meanwhile: called once it has started.
    dirty: percent of the pages to write to just before the switchover, when
    all have been sent; RAM of at most 2 GiB.  That takes no time that counts.
    """
    mode: Mode = PRECOPY
    meanwhile: Optional[Callable[[Session], None]] = None
    dirty: int = 0
    loads = True

    @property
    def must_have_run(self) -> bool:
        """Of a guest in "prelaunch", QEMU aborts taking a snapshot."""
        return 'background-snapshot' in self.mode.saving

    def run(self, session: Session) -> Times:
        assert session.destination
        mode, source, destination = (self.mode, session.source, session.destination)
        parameters = {'max-bandwidth': _BANDWIDTH, **mode.parameters}
        more = ('pause-before-switchover',) if self.dirty else ()
        configure(source, (*mode.capabilities, *mode.saving, *more, 'events'),
                  parameters)
        configure(destination, (*mode.capabilities, 'events'), parameters)
        for guest in (source, destination):
            guest.migration_times()     # forget what was before
        if mode.file:
            return self._through_file(session, source, destination)
        return self._through_loopback(session, source, destination)

    def _through_file(self, session: Session, source: Guest,
                      destination: Guest) -> Times:
        save, load = self.mode.uris(os.path.join(session.directory, 'state'))
        started = time.monotonic()
        source.qmp('migrate', uri=save)
        info = wait_for_migration(session, source)
        saved = time.monotonic()
        destination.qmp('migrate-incoming', uri=load)
        wait_for_migration(session, destination)
        loaded = _times(session, destination)
        return Times(info['total-time'] / 1000, saved - started,
                     loaded['completed'] - min(loaded.values()), info['ram'])

    def _through_loopback(self, session: Session, source: Guest,
                          destination: Guest) -> Times:
        postcopy = self.mode.postcopy
        address = listen(destination)
        started = time.monotonic()
        source.qmp('migrate', uri=address)
        if self.meanwhile:
            self.meanwhile(session)
        if postcopy:
            source.qmp('migrate-start-postcopy')
        if self.dirty:
            self._dirty(session)
        info = wait_for_migration(session, source)
        wait_for_migration(session, destination)
        wall = time.monotonic() - started
        if postcopy and not info['ram'].get('postcopy-bytes'):
            raise MigrationFailed('it never switched to postcopy')
        downtime = info['downtime'] / 1000
        sent = _times(session, source)
        received = _times(session, destination)
        if 'device' in sent and not postcopy:
            downtime = received['completed'] - sent['device']
        paused = (sent['device'] - sent['pre-switchover'] if self.dirty else 0.0)
        return Times(info['total-time'] / 1000 - paused, wall - paused,
                     ram=info['ram'], downtime=downtime)

    def _dirty(self, session: Session) -> None:
        source = session.source
        session.wait_until(lambda: source.query_migrate()['status'] == 'pre-switchover')
        write_by_qtest(source, dirty_pages(source.ram.size, self.dirty))
        source.qmp('migrate-continue', state='pre-switchover')

    def file_size(self, size: int) -> int:
        return super().file_size(size) if self.mode.file else 0


@dataclass(frozen=True)
class InternalSnapshot(Operation):
    """savevm to a new qcow2 image, and loadvm right afterwards."""

    def run(self, session: Session) -> Times:
        guest = session.source
        path = os.path.join(session.directory, 'disk')
        snapshot = {'tag': 'snapshot', 'vmstate': 'disk', 'devices': ['disk']}

        guest.qmp('blockdev-add', **create_qcow2(guest, path, MIB),
                  **{'node-name': 'disk'})
        started = time.monotonic()
        run_job(guest, 'snapshot-save', **snapshot)
        saved = time.monotonic()
        run_job(guest, 'snapshot-load', **snapshot)
        return Times(saved - started, saved - started, time.monotonic() - saved)


@dataclass(frozen=True)
class Dump(Operation):
    """dump-guest-memory, without paging.

    dump_format: 'elf', 'kdump-zlib', ...
    """
    dump_format: str

    def run(self, session: Session) -> Times:
        path = os.path.join(session.directory, 'dump')
        started = time.monotonic()
        session.source.qmp('dump-guest-memory', paging=False, detach=False,
                           protocol=f'file:{path}', format=self.dump_format)
        wall = time.monotonic() - started
        return Times(wall, wall)


@dataclass(frozen=True)
class DirtyRate(Operation):
    """calc-dirty-rate for one second by page sampling.

    pages: to sample in each GiB of RAM.
    """
    pages: int

    def run(self, session: Session) -> Times:
        source = session.source
        started = time.monotonic()
        source.qmp('calc-dirty-rate', mode='page-sampling',
                   **{'calc-time': 1, 'sample-pages': self.pages})
        session.wait_until(
            lambda: source.qmp('query-dirty-rate')['status'] == 'measured')
        wall = time.monotonic() - started
        return Times(wall, wall)

    def file_size(self, _: int) -> int:
        return 0


@dataclass(frozen=True)
class MeasureConfig:
    """What to measure.  Sizes in bytes.

    destination: the destination's backend, if it has another one.
    fill: None for an idle guest, or n for data in every n-th page.
    scatter: how much data to spread over RAM, see content.scatter().
    capabilities: those of the operation come on top.
    directory: where temporary files may go.
    verify: compare the guests' RAM afterwards; takes long for a lot of data.
    memory_floor, timeout: as in once.MigrateConfig.
    """
    binary: str
    size: int
    directory: str
    backend: str = 'memfd'
    destination: Optional[str] = None
    fill: Optional[int] = None
    scatter: Optional[int] = None
    capabilities: Tuple[str, ...] = ()
    accel: str = 'tcg'
    verify: bool = True
    extra_args: Tuple[str, ...] = ()
    memory_floor: int = 1 * GIB
    timeout: float = 600.0


@dataclass(frozen=True)
class Measurement:
    """What was measured once.  Sizes in bytes, times in seconds.

    source, destination: what was added meanwhile, by side.
    expected_holes: pages of RAM that were holes before; None if the backend
    does not tell, or if a hole may not be a zero page.
    holes: what query-migrate said; None if it does not say.
    differing_pages: None if that was not looked at.
    """
    version: str
    times: Times
    source: 'Growth'
    destination: Optional['Growth']
    expected_holes: Optional[int]
    holes: Optional[int]
    differing_pages: Optional[int]


@dataclass(frozen=True)
class Growth:
    """What a process has more of than before.

    ram: bytes of guest RAM: of its file, or, with anonymous RAM, of the
    process's anonymous memory.
    page_tables: bytes.  cpu: seconds of processor time.
    rss_peak: bytes that were resident at most, over those before.
    silence: seconds that the monitor took for an answer, at most.
    """
    ram: int
    page_tables: int
    cpu: float
    rss_peak: int
    silence: float = 0.0


def ram_growth(before: Sample, after: Sample) -> int:
    """Bytes of guest RAM allocated meanwhile, see Growth."""
    if before.allocated is None or after.allocated is None:
        return after.rss_anon - before.rss_anon
    return after.allocated - before.allocated


def cpu_time(pid: int) -> float:
    """Seconds of processor time that a process has used so far.

    Not those of /proc/PID/stat, which come in ticks.
    """
    # As clock_getcpuclockid(3) makes it
    return time.clock_gettime(~pid << 3 | 2)


class _Meter:
    """Remembers how a guest was, tells how it has grown."""

    def __init__(self, guest: Guest, pinger: Pinger):
        self._guest = guest
        self._pinger = pinger
        reset_rss_peak(guest.pid)
        self._before = guest.sample()
        self._cpu = cpu_time(guest.pid)

    def growth(self) -> Growth:
        """Since this was made.  The pinger has to have ended."""
        after = self._guest.sample()
        return Growth(ram_growth(self._before, after),
                      after.page_tables - self._before.page_tables,
                      cpu_time(self._guest.pid) - self._cpu,
                      after.rss_peak - self._before.rss,
                      self._pinger.longest)


def count_holes(ram: Ram, backend: str) -> Optional[int]:
    """Pages of guest RAM that are holes and so zero, None if unknown."""
    allocated = ram.allocated()
    if allocated is None or backend == 'memfd-private':
        return None
    return (ram.size - allocated) // PAGE_SIZE


def ram_file(stack: ExitStack, backend: str, size: int, directory: str) -> str:
    """The file that a backend wants to be there before; its name.

    directory: for one that is not to be memory.
    """
    kind = KINDS[backend]
    if kind.directory is None:
        return ''
    file = stack.enter_context(tempfile.NamedTemporaryFile(
        prefix='sparse-ram-', dir=kind.directory or directory))
    if kind.reserved:
        os.posix_fallocate(file.fileno(), 0, size)
    os.truncate(file.name, size)
    return file.name


def measure(operation: Operation, config: MeasureConfig) -> Measurement:
    """Start a stopped guest, prepare its RAM, do it, measure, end it all.

    Raises MigrationFailed or GuestError; nothing is left behind then either.
    """
    with ExitStack() as stack:
        # Entered first, removed last: no guest writes there any more
        directory = stack.enter_context(tempfile.TemporaryDirectory(
            prefix='tmp-', dir=config.directory))
        # The name of a socket must not be long
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix='sparse-ram-'))

        def guest(name: str, backend: str, incoming: bool = False) -> Guest:
            return stack.enter_context(Guest(
                name, config.binary, config.size, backend=backend,
                accel=config.accel, paused=True, incoming=incoming,
                ram_file=ram_file(stack, backend, config.size, directory),
                extra_args=(
                    '-qmp', f'unix:{sockets}/{name},server=on,wait=off',
                    *config.extra_args)))

        guests = [guest('source', config.backend)]
        if operation.loads:
            guests += [guest('destination', config.destination or config.backend, True)]
        watchdog = stack.enter_context(
            watched(guests, config.memory_floor, config.timeout))
        if operation.must_have_run:
            guests[0].qmp('cont')
            guests[0].qmp('stop')
        if config.fill:
            content.fill(guests[0].ram, config.fill)
        if config.scatter:
            content.scatter(guests[0].ram, config.scatter)
        for each in guests:
            configure(each, config.capabilities, {})
        expected = count_holes(guests[0].ram, config.backend)
        with ExitStack() as pinging:
            meters = [_Meter(each, pinging.enter_context(
                Pinger(os.path.join(sockets, each.name)))) for each in guests]
            times = operation.run(Session(
                guests[0], guests[1] if operation.loads else None, watchdog,
                directory))
        growths = [meter.growth() for meter in meters]
        measured = Measurement(
            version=guests[0].version(), times=times,
            source=growths[0],
            destination=growths[1] if operation.loads else None,
            expected_holes=expected,
            holes=times.ram.get('holes'),
            differing_pages=_differing_pages(guests, config.verify))
    return measured


def _differing_pages(guests: Iterable[Guest], verify: bool) -> Optional[int]:
    rams = [guest.ram for guest in guests]
    if not verify or len(rams) != 2:
        return None
    return content.compare(*rams).differing_pages
