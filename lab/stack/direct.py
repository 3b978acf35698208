# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations of QEMU's own, from one host to the other."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import List, Sequence, Tuple

from lab.cli import memory_floor
from lab.measure.operation import Migrate, Session
from lab.memory import GIB, MIB
from lab.migrate import clear_capabilities, watched
from lab.modes import MODES

from .guest import IoConsole, check, wait_for_boot
from .hosts import NEWEST, PATCHED, STOCK, Host
from .vm import Kind, Vm

HOP_TIMEOUT = 240

# What a side may have more than the source had: the guest runs on meanwhile
MARGIN = 128 * MIB

NAMES = {PATCHED: 'patched', STOCK: 'stock', NEWEST: 'newest'}


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


def complaints(hop: Hop, guest_size: int) -> List[str]:
    """What is wrong with the memory of the patched side."""
    problems = []
    if hop.source == 'patched' and hop.after > hop.before + MARGIN:
        problems.append('the source has filled up')
    # A source that is full already says nothing about what is needed
    bound = min(hop.before + MARGIN, guest_size // 2)
    if hop.destination == 'patched' and hop.there > bound:
        problems.append('the destination has filled up')
    return problems


class Chain:
    """One guest that moves to and fro between two hosts."""

    def __init__(self, hosts: Sequence[Host], kind: Kind, log: str) -> None:
        self._hosts, self._kind = hosts, kind
        self._console = IoConsole(log)
        self._stack = ExitStack()
        self._vm: Vm

    def boot(self, binary: str) -> float:
        """Start it; returns the seconds until its loads are at work."""
        self._vm = self._new(self._stack, self._hosts[0], binary, incoming=False)
        return wait_for_boot(self._console, self._kind.targets)

    def _new(self, stack: ExitStack, host: Host, binary: str,
             incoming: bool) -> Vm:
        vm = stack.enter_context(Vm(host, binary, self._kind, incoming))
        self._console.attach(vm.path('serial'))
        return vm

    def hop(self, name: str, binary: str) -> Hop:
        """Migrate it to the other host, and end what it leaves."""
        source = self._vm
        other = self._hosts[source.host is self._hosts[0]]
        mode = MODES[name].also(multifd_channels=4, downtime_limit=1000,
                                max_bandwidth=1 * GIB)
        with ExitStack() as stack:
            destination = self._new(stack, other, binary, incoming=True)
            # It was a destination before, and has those of that time
            clear_capabilities(source)
            before = source.allocated()
            with watched((source, destination), memory_floor(),
                         HOP_TIMEOUT) as watchdog:
                times = Migrate(mode).run(
                    Session(source, destination, watchdog, ''))
            after, there = source.allocated(), destination.allocated()
            self._stack.close()
            self._stack = stack.pop_all()
        self._vm = destination
        said = check(self._console, self._kind.targets)
        hop = Hop(name, NAMES[source.binary], NAMES[binary], times.wall, before,
                  after, there, said)
        return hop.judged(complaints(hop, self._kind.size))

    def end(self) -> None:
        """End it where it is."""
        self._stack.close()
