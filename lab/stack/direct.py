# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations of QEMU's own, from one host to the other."""

import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from .common import MIB, Failure
from .guest import IoConsole, check
from .hosts import PATCHED, STOCK, Host
from .vm import Kind, Vm

BOOT_TIMEOUT = 240
HOP_TIMEOUT = 240
CHECK_TIMEOUT = 60

# What a side may have more than the source had: the guest runs on meanwhile
MARGIN = 128 * MIB

NAMES = {PATCHED: 'patched', STOCK: 'stock'}


@dataclass(frozen=True)
class Mode:
    """A way to migrate; capabilities of which stock knows all but one."""
    capabilities: Tuple[str, ...] = ()
    parameters: Dict[str, Any] = field(default_factory=dict)

    @property
    def postcopy(self) -> bool:
        """Whether the guest moves before its memory has."""
        return 'postcopy-ram' in self.capabilities


_CHANNELS = {'multifd-channels': 4}

MODES = {
    'precopy': Mode(),
    'multifd': Mode(('multifd',), _CHANNELS),
    'sparse-ram': Mode(('sparse-ram',)),
    'sparse-ram, multifd': Mode(('sparse-ram', 'multifd'), _CHANNELS),
    'postcopy': Mode(('postcopy-ram',)),
    'postcopy, preempt': Mode(('postcopy-ram', 'postcopy-preempt')),
    'sparse-ram, postcopy': Mode(('sparse-ram', 'postcopy-ram',
                                  'postcopy-preempt')),
}


@dataclass(frozen=True)
class Hop:
    """What came of one migration.  Sizes in bytes."""
    mode: str
    source: str
    destination: str
    seconds: float
    before: int
    after: int
    there: int
    guest: str
    problems: Tuple[str, ...] = ()

    def judged(self, problems: Sequence[str]) -> 'Hop':
        """With what is wrong."""
        return replace(self, problems=tuple(problems))


def _set_mode(vm: Vm, mode: Mode) -> None:
    on = {each['capability']
          for each in vm.qmp('query-migrate-capabilities') if each['state']}
    states = [(name, False) for name in on - set(mode.capabilities)]
    states += [(name, True) for name in mode.capabilities]
    vm.qmp('migrate-set-capabilities', capabilities=[
        {'capability': name, 'state': state} for name, state in states])
    vm.qmp('migrate-set-parameters', **mode.parameters,
           max_bandwidth=1 << 30, downtime_limit=1000)


def _ended(vm: Vm) -> Callable[[], bool]:
    def ask() -> bool:
        state = vm.qmp('query-migrate')
        if state.get('status') in ('failed', 'cancelled', 'postcopy-paused'):
            raise Failure(f'migration {state["status"]}: '
                          f'{state.get("error-desc", "no reason given")}')
        return state.get('status') == 'completed'
    return ask


def migrate(source: Vm, destination: Vm, mode: Mode) -> float:
    """Do it; returns the seconds until both sides have ended it."""
    for vm in (source, destination):
        _set_mode(vm, mode)
    destination.qmp('migrate-incoming', uri='tcp:127.0.0.1:0')
    port = destination.qmp('query-migrate')['socket-address'][0]['port']
    started = time.monotonic()
    if mode.postcopy:
        # Slowly, so that it does not end before postcopy starts
        source.qmp('migrate-set-parameters', max_bandwidth=16 * MIB)
    source.qmp('migrate', uri=f'tcp:127.0.0.1:{port}')
    if mode.postcopy:
        time.sleep(1)
        source.qmp('migrate-start-postcopy')
    source.qmp.wait('the end of the migration', _ended(source), HOP_TIMEOUT)
    destination.qmp.wait('the end on the destination', _ended(destination),
                         HOP_TIMEOUT)
    seconds = time.monotonic() - started
    if mode.postcopy and not source.qmp('query-migrate')['ram']['postcopy-bytes']:
        raise Failure('the migration ended before postcopy started')
    return seconds


def complaints(hop: Hop, guest_size: int) -> List[str]:
    """What is wrong with the memory of the patched side."""
    problems = []
    if hop.source != 'stock' and hop.after > hop.before + MARGIN:
        problems.append('the source has filled up')
    # A source that is full already says nothing about what is needed
    bound = min(hop.before + MARGIN, guest_size // 2)
    if hop.destination != 'stock' and hop.there > bound:
        problems.append('the destination has filled up')
    return problems


class Chain:
    """One guest that moves to and fro between two hosts."""

    def __init__(self, hosts: Sequence[Host], kind: Kind, log: str) -> None:
        self._hosts, self._kind = hosts, kind
        self._console = IoConsole(log)
        self._vm: Optional[Vm] = None

    def boot(self, binary: str) -> float:
        """Start it; returns the seconds until its loads are at work."""
        started = time.monotonic()
        self._vm = self._new(self._hosts[0], binary, incoming=False)
        while len(self._console.checked) < self._kind.targets or not all(
                self._console.checked.values()):
            if self._console.trouble():
                raise Failure(f'the guest says: {self._console.trouble()}')
            if time.monotonic() > started + BOOT_TIMEOUT:
                raise Failure('the guest has not booted within '
                              f'{BOOT_TIMEOUT} seconds')
            time.sleep(0.1)
        check(self._console, self._kind.targets, CHECK_TIMEOUT)
        return time.monotonic() - started

    def _new(self, host: Host, binary: str, incoming: bool) -> Vm:
        vm = Vm(host, binary, self._kind, incoming)
        self._console.attach(vm.path('serial'))
        return vm

    def hop(self, name: str, binary: str) -> Hop:
        """Migrate it to the other host, and end what it leaves."""
        source = self._vm
        assert source is not None
        other = self._hosts[source.host is self._hosts[0]]
        destination = self._new(other, binary, incoming=True)
        before = source.allocated()
        seconds = migrate(source, destination, MODES[name])
        after, there = source.allocated(), destination.allocated()
        source.end()
        self._vm = destination
        said = check(self._console, self._kind.targets, CHECK_TIMEOUT)
        hop = Hop(name, NAMES[source.binary], NAMES[binary], seconds, before,
                  after, there, said)
        return hop.judged(complaints(hop, self._kind.size))

    def end(self) -> None:
        """End it where it is."""
        if self._vm:
            self._vm.end()
