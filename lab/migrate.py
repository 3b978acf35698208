# SPDX-License-Identifier: GPL-2.0-or-later
"""What a migration between two QEMU processes of this machine takes."""

import threading
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Sequence

from lab import memory
from lab.memory import MIB
from lab.modes import TCP
from lab.qemu import Guest, GuestError, Qemu

_WATCH_INTERVAL = 0.02          # seconds
_CANCEL_GRACE = 3.0             # seconds between asking and killing
_POLL_INTERVAL = 0.05           # seconds
_JOB_POLL_INTERVAL = 0.005


class MigrationFailed(Exception):
    """The migration did not complete; says why."""


class MigrationAborted(MigrationFailed):
    """We stopped it: memory or time ran short."""


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
        while (time.monotonic() < deadline and self._available() > self._floor // 2):
            if self._stop.wait(_WATCH_INTERVAL):
                return
        self._kill()


@contextmanager
def watched(guests: Sequence[Qemu], floor: int, timeout: float) -> Iterator[Watchdog]:
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


def run_job(qemu: Qemu, command: str, **arguments: Any) -> None:
    """Run a job, such as snapshot-save, to its end.

    Raises MigrationFailed if it fails.
    """
    qemu.qmp(command, **{'job-id': 'job'}, **arguments)
    while True:
        job, = (each for each in qemu.qmp('query-jobs') if each['id'] == 'job')
        if job['status'] == 'concluded':
            break
        time.sleep(_JOB_POLL_INTERVAL)
    qemu.qmp('job-dismiss', id='job')
    if 'error' in job:
        raise MigrationFailed(f'{qemu.name}: {command}: {job["error"]}')


def create_qcow2(qemu: Qemu, path: str, size: int) -> Dict[str, Any]:
    """Make an empty image; returns what blockdev-add takes it with, but its name."""
    file = {'driver': 'file', 'filename': path}
    image = {'driver': 'qcow2', 'file': file}
    run_job(qemu, 'blockdev-create', options={**file, 'size': 0})
    run_job(qemu, 'blockdev-create', options={**image, 'size': size})
    return image


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


def why_failed(destination: Guest, info: Dict[str, Any]) -> str:
    """The destination usually exits, and it is the one that knows why."""
    try:
        time.sleep(_POLL_INTERVAL)
        why = destination.query_migrate().get('error-desc')
    except GuestError as err:
        why = str(err)
    return why or info.get('error-desc') or f'migration {info["status"]}'
