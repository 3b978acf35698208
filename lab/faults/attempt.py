# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration, from its start until nothing more can come of it."""

import os
import random
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from lab.faults.cases import BYTES, SECONDS, Case, Cut
from lab.faults.known import has_migration_thread
from lab.faults.peek import Expected, Peeker
from lab.faults.proxy import Proxy
from lab.faults.sides import Side
from lab.memory import PAGE_SIZE
from lab.migrate import (MigrationAborted, Watchdog, address_of,
                         clear_capabilities, configure, listen)
from lab.modes import TCP
from lab.qemu import GuestError, GuestGone


_POLL_INTERVAL = 0.004          # seconds

# How long a destination is given to notice that nothing comes any more, if it
# may as well go on waiting for a connection
_GRACE = 3.0                    # seconds

_RECOVERIES = 8
_RECOVERIES_WITHOUT_MEMORY = 3

# How long QEMU may take to clean up after a migration that has failed
_CLEANUP_SECONDS = 10.0

# Of 'held': accesses to data and to zero pages that have not arrived, how long
# they are seen to wait, and how long they may wait once they can be answered
_HELD = 8
_HELD_SECONDS = 0.3
_ANSWER_SECONDS = 10.0

GONE = 'gone'
_SOURCE_DONE = ('completed', 'failed', 'cancelled', GONE)
_DESTINATION_DONE = ('completed', 'failed', GONE)
_PAUSED = 'postcopy-paused'


class Hang(MigrationAborted):
    """Somebody waits for what never comes; says who."""


def state(side: Side) -> str:
    """What query-migrate says, or GONE."""
    if side.ended() is not None:
        return GONE
    try:
        return str(side.query_migrate().get('status', 'none'))
    except GuestGone:
        return GONE


@dataclass
class Ending:
    """What became of a migration.

    source, destination: states.
    happened: whether the fault has.
    ran: whether the destination came as far as to run the guest.
    recoveries: how many were tried.
    held: accesses that waited while the channel was broken, and were answered
    before postcopy ended.
    """
    source: str = 'none'
    destination: str = 'none'
    happened: bool = False
    ran: bool = False
    recoveries: int = 0
    held: int = 0


_DEFAULTS: Dict[str, Any] = {
    'multifd-channels': 2, 'zero-page-detection': 'multifd',
    'max-bandwidth': 1 << 40, 'max-postcopy-bandwidth': 0}


def prepare(side: Side, case: Case, bandwidth: int = 0) -> None:
    """Set what a case wants, whatever was set before."""
    clear_capabilities(side)
    parameters = {**_DEFAULTS, **case.how.parameters}
    if bandwidth:
        parameters.update({'max-bandwidth': bandwidth,
                           'max-postcopy-bandwidth': bandwidth})
    more = {'return-path'} if case.return_path and not case.how.file else set()
    configure(side, {*case.how.capabilities, *more}, parameters)


class Attempt:
    """One migration of a case; run() it once."""

    def __init__(self, case: Case, source: Side, destination: Side,
                 directory: str, expected: Expected, watchdog: Watchdog):
        """
        directory: for sockets and files
        expected: what the accesses to the destination have to find; gets
        what they write
        """
        self._case = case
        self._source = source
        self._destination = destination
        self._directory = directory
        self.expected = expected
        self._watchdog = watchdog
        self._dice = random.Random(case.seed + 1)
        self._proxy: Optional[Proxy] = None
        self._stack = ExitStack()
        self._started = 0.0
        self._active_since: Optional[float] = None
        self._switched = False
        self._acted = False
        self._cuts_left: List[Cut] = list(case.cuts)
        self._armed: List[Proxy] = []
        self._held: List[Peeker] = []
        self.ending = Ending()
        self.peekers: List[Peeker] = []

    def run(self) -> Ending:
        """Raises Hang, and GuestError if a command is refused that should
        not be.
        """
        with self._stack:
            try:
                if self._case.how.file:
                    self._through_file()
                else:
                    self._through_network()
            finally:
                for peeker in self.peekers:
                    peeker.stop()
        self._collect()
        return self.ending

    def _collect(self) -> None:
        """What happened, of what has no time of its own."""
        # It may have been killed since
        for name, side in (('source', self._source),
                           ('destination', self._destination)):
            if side.killed:
                setattr(self.ending, name, GONE)
        for proxy in self._armed:
            if proxy.error:
                raise proxy.error
            self.ending.happened |= bool(proxy.cut_happened)
        for side in (self._source, self._destination):
            if side.fail_calls:
                self.ending.happened |= any(
                    failed for _, failed in side.fail_calls.failed())

    def join_peekers(self) -> None:
        """Once all of RAM is there, or the destination is dead."""
        for peeker in self.peekers:
            peeker.join(20)
            if peeker.is_alive():
                raise Hang('an access to page '
                           f'{peeker.waiting} of the destination waits for '
                           'ever')

    # Both kinds

    def _settle(self, done: Any) -> None:
        """Drive it until done(source's state, destination's state)."""
        since: Optional[float] = None
        while True:
            ending = self.ending
            ending.source = state(self._source)
            ending.destination = state(self._destination)
            if self._watchdog.tripped:
                raise Hang(f'source {ending.source}, destination '
                           f'{ending.destination}: {self._watchdog.tripped}')
            self._drive()
            verdict = done(ending.source, ending.destination)
            if verdict is True:
                return
            if verdict is None:         # unless something comes of it yet
                since = since or time.monotonic()
                if time.monotonic() - since > _GRACE:
                    return
            else:
                since = None
            time.sleep(_POLL_INTERVAL)

    def _drive(self) -> None:
        """Do what has become possible."""
        case = self._case
        if case.how.postcopy:
            self._drive_postcopy()
        if self._acted or case.moment is None or case.fault in ('truncate', 'pause'):
            return
        if case.fault == 'kill-destination' and case.how.file:
            return
        if self._moment_has_come():
            self._act()

    def _moment_has_come(self) -> bool:
        moment = self._case.moment
        assert moment
        if moment.what == SECONDS:
            return time.monotonic() - self._started >= moment.value
        return self._proxy is not None and self._proxy.reached('fault')

    def _act(self) -> None:
        """The fault happens now."""
        self._acted = True
        if self._case.fault.startswith('kill-'):
            (self._source if self._case.fault == 'kill-source'
             else self._destination).kill()
            self.ending.happened = True
        elif self._case.fault.startswith('cancel'):
            self._try(self._source, 'migrate_cancel')
            if self._proxy:
                self._proxy.release()

    def _try(self, side: Side, command: str, **arguments: Any) -> bool:
        """A command that may come too late, or too early."""
        try:
            side.qmp(command, **arguments)
        except GuestError:
            return False
        self.ending.happened = True
        return True

    def _start_migration(self, uri: str) -> None:
        """The one before may have failed without having cleaned up yet."""
        deadline = time.monotonic() + _CLEANUP_SECONDS
        while True:
            try:
                self._source.qmp('migrate', uri=uri)
                return
            except GuestGone:
                raise
            except GuestError as err:
                if 'duplicate yank instance' not in str(err) or \
                        time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_INTERVAL)

    # Through connections

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _uri(self, name: str) -> str:
        return (f'unix:{self._path(name)}' if self._case.transport == 'unix' else TCP)

    def _through_network(self) -> None:
        case = self._case
        uri = listen(self._destination, self._uri('destination'),
                     **{'exit-on-error': case.exit_on_error})
        proxy = self._new_proxy(uri)
        if case.fault == 'cancel-early':
            proxy.refuse()
        if case.how.postcopy:
            proxy.hold_at('switch', case.switch)
        if case.fault == 'cut':
            proxy.cut(self._cuts_left.pop(0))
        if case.moment and case.moment.what == BYTES:
            self._stop_at(proxy, int(case.moment.value))
        self._started = time.monotonic()
        self._start_migration(proxy.uri)
        if case.fault == 'cancel-early':
            time.sleep(self._dice.uniform(0, 0.1))
            self._act()
        self._settle(self._network_is_done)

    def _new_proxy(self, target: str) -> Proxy:
        where = ('tcp' if self._case.transport == 'tcp'
                 else f'unix:{self._path(f"proxy-{len(self._armed)}")}')
        self._proxy = self._stack.enter_context(Proxy(target, where))
        self._armed.append(self._proxy)
        return self._proxy

    def _stop_at(self, proxy: Proxy, position: int) -> None:
        if self._case.fault.startswith('kill-'):
            self._acted = True          # by the proxy
            proxy.do_at('fault', position, self._act)
        elif self._case.fault == 'pause':
            proxy.hold_at('fault', self._case.switch + position)
        else:
            proxy.hold_at('fault', position)

    def _network_is_done(self, source: str, destination: str) -> Optional[bool]:
        """True, False, or None: if it stays like that."""
        if source in _SOURCE_DONE and destination in _DESTINATION_DONE:
            return True
        if _PAUSED in (source, destination) and GONE in (source, destination):
            return True
        if source == _PAUSED and destination == 'failed':
            return None
        if source == 'active' and destination == GONE and \
                'postcopy-preempt' in self._case.how.capabilities:
            return None                 # it may wait for ever
        if source == 'cancelling' and not has_migration_thread(self._source):
            return None
        if source in _SOURCE_DONE and destination in ('none', 'setup', _PAUSED):
            return None
        if source == destination == _PAUSED:
            if self._case.fault == 'held' and not self._held:
                self._access_while_paused()
            if self._memory_never_comes():
                return True
            self._recover()
        return False

    def _memory_never_comes(self) -> bool:
        """Whether to recover once more would end like the times before."""
        return (self._case.fault in ('tmpfs-full', 'oom') and
                self.ending.recoveries >= _RECOVERIES_WITHOUT_MEMORY)

    # Postcopy

    def _drive_postcopy(self) -> None:
        ending, case = self.ending, self._case
        assert self._proxy
        # Refused before the migration is active
        if not self._switched and self._proxy.reached('switch') and \
                ending.source != 'setup':
            if ending.source not in _SOURCE_DONE:
                with suppress(GuestGone):
                    self._source.qmp('migrate-start-postcopy')
            self._switched = True
            self._proxy.release()
        if ending.destination == 'postcopy-active' and case.peeks and not self.peekers:
            self._start_peekers()
        if ending.source == ending.destination == 'postcopy-active' and \
                self._active_since is None and self._is_running():
            self._active_since = time.monotonic()
            ending.ran = True
            # Bytes count from here: both sides are in postcopy
            if case.fault == 'cut-recover' and self._cuts_left:
                self._proxy.cut(self._cuts_left.pop(0), from_now=True)
        if case.fault == 'pause' and not self._acted:
            self._drive_pause()
        if case.fault == 'held' and ending.ran:
            self._drive_held()

    def _is_running(self) -> bool:
        try:
            return self._destination.status() != 'inmigrate'
        except GuestGone:
            return False

    def _drive_pause(self) -> None:
        moment = self._case.moment
        assert moment and self._proxy
        if moment.what == BYTES:
            due = self._proxy.reached('fault')
        else:
            due = (self._active_since is not None and
                   time.monotonic() - self._active_since >= moment.value)
        if not due:
            return
        side = (self._destination if self._case.pause_destination else self._source)
        # Too early: once more when both sides are that far
        self._acted = (self._try(side, 'migrate-pause')
                       or self._active_since is not None
                       or self.ending.source in _SOURCE_DONE)
        self._proxy.release()

    # Accesses to what has not arrived when the channel breaks

    def _drive_held(self) -> None:
        """Pause once; when that is over, see who has been answered."""
        if not self._acted:
            self._acted = self._try(self._source, 'migrate-pause')
        if self._held and not self.ending.held and \
                self.ending.destination == 'postcopy-active':
            self._wait_for_answers()

    def _access_while_paused(self) -> None:
        """What has arrived is there; what has not is waited for."""
        early, late = self._zero_pages()
        first = self._peek(early, [early], 0)
        first.join(_ANSWER_SECONDS)
        if first.is_alive():
            raise Hang(f'page {early}, which has arrived as zero, is not '
                       'there while the channel is broken')
        for page in [*late, *self._missing_data()]:
            self._held.append(self._peek(page, [page], 0))
        time.sleep(_HELD_SECONDS)
        for peeker in self._held:
            if not peeker.is_alive():
                raise Hang('an access to a page that has not arrived did '
                           f'not wait: {peeker.wrong}')

    def _peek(self, seed: float, pages: List[int], writes: float) -> Peeker:
        """Begin to access pages of the destination."""
        peeker = Peeker(self._destination.pid, self._destination.ram.address,
                        self.expected, random.Random(seed), pages, writes)
        self.peekers.append(peeker)
        peeker.start()
        return peeker

    def _zero_pages(self) -> Tuple[int, List[int]]:
        """One of the first in the stream, and some of the last."""
        snapshot = self.expected.snapshot
        zero = bytes(PAGE_SIZE)
        pages = [page for page in range(self._case.size // PAGE_SIZE)
                 if snapshot.read(page * PAGE_SIZE, PAGE_SIZE) == zero]
        return pages[0], pages[-_HELD // 2:]

    def _missing_data(self) -> List[int]:
        """Data that the destination does not have."""
        there = {page for start, end in self._destination.ram.extents()
                 for page in range(start // PAGE_SIZE, end // PAGE_SIZE)}
        snapshot = self.expected.snapshot
        missing = [page for page in range(self._case.size // PAGE_SIZE)
                   if page not in there and
                   any(snapshot.read(page * PAGE_SIZE, PAGE_SIZE))]
        return missing[-_HELD // 2:]

    def _wait_for_answers(self) -> None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        for peeker in self._held:
            peeker.join(max(0.0, deadline - time.monotonic()))
        if state(self._destination) != 'postcopy-active':
            return                      # then that may have freed them
        for peeker in self._held:
            if peeker.is_alive():
                raise Hang(f'page {peeker.waiting}, which was accessed while '
                           'the channel was broken, has not come since')
        self.ending.held = len(self._held)
        self._source.qmp('migrate-set-parameters', **{'max-postcopy-bandwidth': 0})

    def _start_peekers(self) -> None:
        pages = range(self._case.size // PAGE_SIZE)
        for _ in range(self._case.peeks):
            self._peek(self._dice.random(), self._dice.sample(pages, 200), 0.3)

    def _recover(self) -> None:
        ending = self.ending
        ending.ran = True
        ending.recoveries += 1
        if ending.recoveries > _RECOVERIES:
            raise Hang(f'paused again after {_RECOVERIES} recoveries')
        uri = self._uri(f'recover-{ending.recoveries}')
        self._destination.qmp('migrate-recover', uri=uri)
        proxy = self._new_proxy(address_of(self._destination, uri))
        if self._cuts_left:
            proxy.cut(self._cuts_left.pop(0))
        self._source.qmp('migrate', uri=proxy.uri, resume=True)

    # Through a file

    def _through_file(self) -> None:
        case = self._case
        path = self._path('state')
        self._started = time.monotonic()
        self._start_migration(f'file:{path}')
        self._settle(lambda source, _: source in _SOURCE_DONE)
        if case.fault == 'truncate' and case.moment:
            length = int(os.path.getsize(path) * case.moment.value)
            os.truncate(path, length)
            self.ending.happened = True
        loads = time.monotonic()
        try:
            with suppress(GuestGone):
                listen(self._destination, f'file:{path}',
                       **{'exit-on-error': case.exit_on_error})
        except GuestError:              # such as: the file is too short
            self.ending.destination = 'none'
            return
        if case.fault == 'kill-destination' and case.moment:
            # To load takes less time than to save
            time.sleep(max(0.0, loads + case.moment.value / 10 - time.monotonic()))
            self._act()
        self._settle(lambda _, destination: destination in _DESTINATION_DONE)
