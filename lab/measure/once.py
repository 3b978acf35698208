# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration between two QEMUs, from start to end, with both as they were before."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

from lab import content
from lab.cgroup import Cgroup
from lab.content import Comparison
from lab.measure.operation import Migrate, Session, Times, ram_growth
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
    """What to migrate, and how: a memfd.

    size, data, memory_floor: bytes.  data is what gets written into the
    source's RAM before, see content.write_data().
    mode: how; by default with the bandwidth that QEMU has by default.
    memory_floor: the migration is aborted when the machine has less
    available than this.
    timeout: seconds for everything between starting and stopping the guests.
    """
    binary: str
    size: int
    data: int = 64 * MIB
    accel: str = 'tcg'
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
    version: str
    source_before: Sample
    source_after: Sample
    destination_before: Sample
    destination_after: Sample
    times: Times
    comparison: Comparison

    @property
    def destination_growth(self) -> int:
        """Bytes allocated on the destination meanwhile."""
        return ram_growth(self.destination_before, self.destination_after)

    @property
    def source_growth(self) -> int:
        """Bytes allocated on the source meanwhile."""
        return ram_growth(self.source_before, self.source_after)

    @property
    def source_holds(self) -> int:
        """Bytes of RAM that the source had before the migration read it."""
        return self.source_before.allocated or 0

    @property
    def destination_bound(self) -> int:
        """How much the destination may grow and still count as sparse."""
        return self.source_holds + DESTINATION_ALLOWANCE

    @property
    def destination_is_sparse(self) -> bool:
        """Whether the destination stayed within destination_bound."""
        return self.destination_growth <= self.destination_bound


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
    common: Dict[str, Any] = {'accel': config.accel, 'extra_args': config.extra_args}
    with Guest('source', config.binary, config.size, **common) as source, \
         Guest('destination', config.binary, config.size, paused=True,
               incoming=True, cgroup=cgroup, **common) as destination, \
         watched((source, destination), config.memory_floor,
                 config.timeout) as watchdog:
        settle(source)
        content.write_data(source.ram, config.data)
        before = source.sample(), destination.sample()
        progress('migrating')
        times = Migrate(config.mode).run(Session(source, destination, watchdog, ''))
        after = source.sample(), destination.sample()
        progress('comparing RAM')
        return Result(config=config,
                      version=destination.version(),
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
