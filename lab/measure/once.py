# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration between two QEMUs, from start to end, with both as they were before."""

from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Optional, Tuple

from lab import content
from lab.cgroup import Cgroup
from lab.content import Comparison
from lab.measure.operation import Migrate, Session, Times
from lab.memory import GIB, MIB
from lab.migrate import MigrationFailed, settle, watched
from lab.modes import PRECOPY, Mode
from lab.qemu import Guest, GuestError
from lab.ram import Sample

# A destination may need this much for itself: pages that it touches when it
# builds the machine, and a few that the guest changed during the migration.
DESTINATION_ALLOWANCE = 16 * MIB


@dataclass(frozen=True)
class MigrateConfig:
    """What to migrate, and how.

    size, data, memory_floor: bytes.  data is what gets written into the
    source's RAM before, see content.write_data().
    mode: how; by default with the bandwidth that QEMU has by default.
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
    mode: Mode = PRECOPY.also(max_bandwidth=128 * MIB)
    extra_args: Tuple[str, ...] = ()
    memory_floor: int = 1 * GIB
    timeout: float = 300.0


@dataclass(frozen=True)
class Result:
    """What was measured.

    comparison: of the two guests' RAM, both of them stopped.
    """
    config: MigrateConfig
    source_version: str
    destination_version: str
    source_before: Sample
    source_after: Sample
    destination_before: Sample
    destination_after: Sample
    times: Times
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
        before = source.sample(), destination.sample()
        progress('migrating')
        times = Migrate(config.mode).run(
            Session(source, destination, watchdog, ''))
        after = source.sample(), destination.sample()
        progress('comparing RAM')
        return Result(config=config,
                      source_version=source.version(),
                      destination_version=destination.version(),
                      source_before=before[0], source_after=after[0],
                      destination_before=before[1],
                      destination_after=after[1],
                      times=times,
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
