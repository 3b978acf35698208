# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration between two QEMU processes of this machine, measured."""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import (Any, Callable, Dict, Iterable, Iterator, Optional,
                    Sequence, Tuple)

from lab import content, memory
from lab.cgroup import Cgroup
from lab.content import Comparison
from lab.memory import GIB, MIB
from lab.modes import TCP
from lab.qemu import Guest, GuestError, Qemu
from lab.ram import Sample

# A destination may need this much for itself: pages that it touches when it
# builds the machine, and a few that the guest changed during the migration.
DESTINATION_ALLOWANCE = 16 * MIB

_WATCH_INTERVAL = 0.02          # seconds
_CANCEL_GRACE = 3.0             # seconds between asking and killing
_POLL_INTERVAL = 0.05           # seconds


class MigrationFailed(Exception):
    """The migration did not complete; says why."""


class MigrationAborted(MigrationFailed):
    """We stopped it: memory or time ran short."""


@dataclass(frozen=True)
class MigrateConfig:
    """What to migrate, and how.

    size, data, memory_floor: bytes.  data is what gets written into the
    source's RAM before, see content.write_data().
    capabilities: set to on, on both sides; parameters: likewise.
    memory_floor: the migration is aborted when the machine has less
    available than this.
    timeout: seconds for everything between starting and stopping the guests.
    """
    source_binary: str
    destination_binary: str
    size: int
    data: int = 64 * MIB
    source_backend: str = 'memfd'
    destination_backend: str = 'memfd'
    accel: str = 'tcg'
    paused: bool = False
    capabilities: Tuple[str, ...] = ()
    parameters: Dict[str, Any] = field(default_factory=dict)
    extra_args: Tuple[str, ...] = ()
    memory_floor: int = 1 * GIB
    timeout: float = 300.0


@dataclass(frozen=True)
class Result:
    """What was measured.  Times in seconds.

    total_time, downtime: as the source reports them; wall_time: from the
    command until the destination has all, on our own clock.
    ram: statistics of the source, as query-migrate names them.
    comparison: of the two guests' RAM, both of them stopped.
    """
    config: MigrateConfig
    source_version: str
    destination_version: str
    source_before: Sample
    source_after: Sample
    destination_before: Sample
    destination_after: Sample
    total_time: float
    downtime: float
    wall_time: float
    ram: Dict[str, Any]
    comparison: Comparison

    @property
    def destination_growth(self) -> Optional[int]:
        """Bytes allocated on the destination meanwhile, None if unknown."""
        return _growth(self.destination_before, self.destination_after)

    @property
    def source_growth(self) -> Optional[int]:
        """Bytes allocated on the source meanwhile, None if unknown."""
        return _growth(self.source_before, self.source_after)

    @property
    def source_holds(self) -> int:
        """Bytes of RAM that the source had before the migration read it.

        Of anonymous RAM it is those that are not zero: transparent huge
        pages make the rest meaningless.
        """
        if self.source_before.allocated is None:
            return self.comparison.bytes_nonzero
        return self.source_before.allocated

    @property
    def destination_bound(self) -> int:
        """How much the destination may grow and still count as sparse."""
        return self.source_holds + DESTINATION_ALLOWANCE

    @property
    def destination_is_sparse(self) -> bool:
        """Whether the destination stayed within destination_bound."""
        growth = self.destination_growth
        return growth is not None and growth <= self.destination_bound


def _growth(before: Sample, after: Sample) -> Optional[int]:
    if before.allocated is None or after.allocated is None:
        return None
    return after.allocated - before.allocated


class Watchdog:
    """Ends a migration before it exhausts the machine, or when it hangs.

    First it only says so, by tripped, and somebody cancels the migration.
    If that takes too long, or memory keeps falling, the guests are killed:
    a QEMU that is busy filling memory may well not listen.
    """

    def __init__(self, kill: Callable[[], None], floor: int, timeout: float,
                 available: Callable[[], int] = memory.available):
        """floor: bytes; timeout: seconds; kill: must work in any thread"""
        self.tripped: Optional[str] = None
        self._kill = kill
        self._floor = floor
        self._timeout = timeout
        self._available = available
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> 'Watchdog':
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _complaint(self, started: float) -> Optional[str]:
        if self._available() < self._floor:
            return ('stopped, because less than '
                    f'{self._floor // MIB} MiB of memory were available')
        if time.monotonic() - started > self._timeout:
            return f'stopped, because it took over {self._timeout:g} seconds'
        return None

    def _watch(self) -> None:
        started = time.monotonic()
        while not self.tripped:
            self.tripped = self._complaint(started)
            if self._stop.wait(_WATCH_INTERVAL):
                return
        deadline = time.monotonic() + _CANCEL_GRACE
        while (time.monotonic() < deadline
               and self._available() > self._floor // 2):
            if self._stop.wait(_WATCH_INTERVAL):
                return
        self._kill()


@contextmanager
def watched(guests: Sequence[Qemu], floor: int,
            timeout: float) -> Iterator[Watchdog]:
    """Watch over all guests; what fails after it tripped was its doing.

    floor, timeout: as for Watchdog.
    """
    def kill() -> None:
        for guest in guests:
            guest.kill_now()

    with Watchdog(kill, floor, timeout) as watchdog:
        try:
            yield watchdog
        except MigrationAborted:
            raise
        except Exception as err:
            if watchdog.tripped:
                raise MigrationAborted(watchdog.tripped) from err
            raise


def _set_up(source: Guest, destination: Guest, config: MigrateConfig) -> str:
    """Set capabilities and parameters, listen; returns HMP's address."""
    for guest in (source, destination):
        configure(guest, config.capabilities, config.parameters)
    return listen(destination)


def configure(qemu: Qemu, capabilities: Iterable[str],
              parameters: Dict[str, Any]) -> None:
    """Switch capabilities on, and set parameters."""
    if capabilities:
        qemu.qmp('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': True} for name in capabilities])
    if parameters:
        qemu.qmp('migrate-set-parameters', **parameters)


def clear_capabilities(qemu: Qemu) -> None:
    """Switch off what an earlier migration has switched on."""
    is_on = [each['capability']
             for each in qemu.qmp('query-migrate-capabilities')
             if each['state']]
    if is_on:
        qemu.qmp('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': False} for name in is_on])


def listen(destination: Qemu, uri: str = TCP, **options: Any) -> str:
    """Wait for a migration; returns where, for migrate."""
    destination.qmp('migrate-incoming', uri=uri, **options)
    return address_of(destination, uri)


def address_of(destination: Qemu, uri: str) -> str:
    """Where it listens; uri: what it was told, which leaves the port open."""
    if not uri.startswith('tcp:'):
        return uri
    address = destination.query_migrate()['socket-address'][-1]
    return f'tcp:{address["host"]}:{address["port"]}'


def settle(guest: Guest, limit: float = 5.0, quiet: float = 0.5) -> None:
    """Wait until the firmware has booted: no allocation for a while."""
    deadline = time.monotonic() + limit
    last = None
    since = time.monotonic()
    while time.monotonic() < min(deadline, since + quiet):
        now = guest.sample()
        size = now.rss_anon if now.allocated is None else now.allocated
        if size != last:
            last, since = size, time.monotonic()
        time.sleep(_POLL_INTERVAL)


def _migrate(source: Guest, destination: Guest, address: str,
             watchdog: Watchdog) -> Dict[str, Any]:
    """Migrate and wait for both sides; returns the source's query-migrate."""
    printed = source.hmp(f'migrate -d {address}')
    if printed:
        raise MigrationFailed(printed.splitlines()[-1])
    while True:
        if watchdog.tripped:
            source.hmp('migrate_cancel')
            raise MigrationAborted(watchdog.tripped)
        info = source.query_migrate()
        if info['status'] == 'completed':
            break
        if info['status'] in ('failed', 'cancelled'):
            raise MigrationFailed(why_failed(destination, info))
        time.sleep(_POLL_INTERVAL)
    while destination.status() == 'inmigrate':
        if watchdog.tripped:
            raise MigrationAborted(watchdog.tripped)
        time.sleep(_POLL_INTERVAL)
    return info


def why_failed(destination: Guest, info: Dict[str, Any]) -> str:
    """The destination usually exits, and it is the one that knows why."""
    try:
        time.sleep(_POLL_INTERVAL)
        why = destination.query_migrate().get('error-desc')
    except GuestError as err:
        why = str(err)
    return why or info.get('error-desc') or f'migration {info["status"]}'


def _compare(source: Guest, destination: Guest) -> Comparison:
    for guest in (source, destination):
        if guest.status() not in ('postmigrate', 'paused', 'prelaunch'):
            raise MigrationFailed(f'after the migration, {guest.name} is not '
                                  f'stopped: {guest.status()}')
    return content.compare(source.ram, destination.ram)


def migrate_once(config: MigrateConfig,
                 progress: Callable[[str], None] = lambda _: None,
                 cgroup: Optional[Cgroup] = None) -> Result:
    """Start two QEMUs, migrate one into the other, measure, stop both.

    The destination has -S: after the migration no guest runs, so that their
    RAM can be compared.

    progress: gets a few words now and then.
    cgroup: for the destination.
    Raises MigrationFailed or GuestError; nothing is left behind then either.
    """
    common: Dict[str, Any] = {'accel': config.accel,
                              'extra_args': config.extra_args}
    with Guest('source', config.source_binary, config.size,
               backend=config.source_backend, paused=config.paused,
               **common) as source, \
         Guest('destination', config.destination_binary, config.size,
               backend=config.destination_backend, paused=True,
               incoming=True, cgroup=cgroup, **common) as destination, \
         watched((source, destination), config.memory_floor,
                 config.timeout) as watchdog:
        if not config.paused:
            settle(source)
        content.write_data(source.ram, config.data)
        address = _set_up(source, destination, config)
        before = source.sample(), destination.sample()
        progress(f'migrate -d {address}')
        started = time.monotonic()
        info = _migrate(source, destination, address, watchdog)
        wall_time = time.monotonic() - started
        after = source.sample(), destination.sample()
        progress('comparing RAM')
        return Result(config=config,
                      source_version=source.version(),
                      destination_version=destination.version(),
                      source_before=before[0], source_after=after[0],
                      destination_before=before[1],
                      destination_after=after[1],
                      total_time=info['total-time'] / 1000,
                      downtime=info['downtime'] / 1000,
                      wall_time=wall_time,
                      ram=info['ram'],
                      comparison=_compare(source, destination))


@dataclass(frozen=True)
class Pressure:
    """What became of a destination that is short of memory.

    limit, peak: bytes; peak is None if unknown.
    result: None if the kernel killed the destination because it was full.
    """
    config: MigrateConfig
    limit: int
    peak: Optional[int]
    result: Optional[Result]


def migrate_under_pressure(config: MigrateConfig, limit: int,
                           progress: Callable[[str], None]) -> Pressure:
    """Migrate to a destination in a memory cgroup with this limit (bytes).

    Raises Unavailable, and what migrate_once() raises, if that is not
    because the destination was killed.
    """
    result = None
    with Cgroup(limit) as cgroup:
        try:
            result = migrate_once(config, progress, cgroup)
        except (MigrationFailed, GuestError):
            if not cgroup.oom_kills():
                raise
        return Pressure(config, limit, cgroup.peak(), result)


@dataclass(frozen=True)
class Probe:
    """What a small migration showed about either side."""
    source_keeps_holes: bool
    destination_keeps_holes: bool


def probe(config: MigrateConfig) -> Probe:
    """Measure whether a migration like this leaves holes as they are.

    Migrates a stopped memfd guest of 64 MiB, with all else as in config.
    """
    size = 64 * MIB
    result = migrate_once(replace(config, size=size, data=1 * MIB,
                                  source_backend='memfd',
                                  destination_backend='memfd',
                                  paused=True, timeout=30.0))

    def kept(growth: Optional[int]) -> bool:
        assert growth is not None
        return growth < size // 4

    return Probe(kept(result.source_growth), kept(result.destination_growth))
