# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate a real guest back and forth, and see what it says.

Debian's kernel and busybox, in a memfd of 64 GiB, with a load that checks its
own memory (guest-load.c), move from one new QEMU to the next, with another mode
of migration each time.  After each hop the load has to run on and to have found
no error, and neither side may have allocated more than the guest uses, as Linux
says, nor the destination more than the source.  In the end, a stock QEMU and a
smaller guest show that this can fail, and pages that are made zero behind the
back of the load show that it notices.

Exit status: 0 if all is as it should be; 1 if not; 2 for a mistake on the
command line or something missing; 77 if there is no kernel or not enough memory.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence

from lab import memory, modes
from lab.base import BUILD
from lab.cli import (add_qemu_arguments, add_size_arguments, memory_floor,
                     ready, run_main, say)
from lab.guest.linux import Console, Load, lose_writes, prepare
from lab.measure.operation import Migrate, Session
from lab.measure.report import mib, rst_table
from lab.memory import GIB, MIB, format_size
from lab.migrate import MigrationFailed, clear_capabilities, watched
from lab.outcome import Unavailable, Wrong
from lab.qemu import Guest, GuestError, pick_accelerator

SKIPPED = 77

# What a side may have allocated beyond what Linux has ever said to use: pages
# that it has freed and has not reported yet, firmware, video memory
MARGIN = 64 * MIB

# What a destination may have beyond its source: the guest runs on meanwhile
HOP_MARGIN = 64 * MIB

BOOT_TIMEOUT = 300              # seconds
REPORT_TIMEOUT = 60
HOP_TIMEOUT = 300

# How often the load has to report after each hop, which it does every second
REPORTS = 4

# For the load's swing up and down, before the first hop
WARM_UP_REPORTS = 20

# To find out whether the load notices.  Half of its pages are in use
LOST_PAGES = 4096

LOG = os.path.join(BUILD, 'logs/real-guest-console.log')


MODES = {
    'precopy': modes.PRECOPY,
    'multifd': modes.MULTIFD.also(multifd_channels=4),
    'postcopy': modes.POSTCOPY,
    'sparse-ram': modes.SPARSE_RAM,
    'xbzrle': modes.MODES['xbzrle'].also(xbzrle_cache_size=256 * MIB),
    'mapped-ram': modes.MODES['mapped-ram-multifd'],
    'auto-converge': modes.MODES['auto-converge'],
    'sparse-ram,multifd': modes.MODES['sparse-ram-multifd'].also(
        zero_page_detection='legacy'),
    'sparse-ram,postcopy': modes.MODES['sparse-ram-preempt'],
}


@dataclass(frozen=True)
class Hop:
    """One migration.  Sizes in bytes, time in seconds.

    used: by the guest at most, so far, of its RAM.
    before: what the source had allocated; source, destination: afterwards.
    """
    mode: str
    used: int
    before: int
    source: int
    destination: int
    seconds: float


def complaints(hop: Hop) -> List[str]:
    """What is wrong with the memory of either side."""
    bound = hop.used + MARGIN
    problems = [f'the {side} has {mib(size)} MiB allocated, although the guest '
                f'used {mib(hop.used)} MiB at most'
                for side, size in (('source', hop.source),
                                   ('destination', hop.destination))
                if size > bound]
    if hop.destination > hop.source + HOP_MARGIN:
        problems += [f'the destination has {mib(hop.destination)} MiB allocated'
                     f', the source {mib(hop.source)} MiB']
    return problems


def hops_table(hops: Sequence[Hop]) -> str:
    """One row for each."""
    return rst_table(
        ('mode', 'used, MiB', 'source, MiB', 'destination, MiB', 'seconds'),
        [[hop.mode, mib(hop.used), f'{mib(hop.before)} -> {mib(hop.source)}',
          mib(hop.destination), f'{hop.seconds:.1f}'] for hop in hops])


class Traveller:
    """A guest that moves from QEMU to QEMU.  A context manager."""

    def __init__(self, binary: str, size: int, args: argparse.Namespace, log: str):
        """log: for its console"""
        self._binary = binary
        self._size = size
        self._args = args
        self._console = Console(log)
        self._stack = ExitStack()
        self._directory = ''
        self._started = 0
        self._guest: Guest

    def __enter__(self) -> 'Traveller':
        self._directory = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix='sparse-ram-'))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def _new_qemu(self, stack: ExitStack, incoming: bool) -> Guest:
        self._started += 1
        path = os.path.join(self._directory, f'serial{self._started}')
        guest = stack.enter_context(Guest(
            f'QEMU {self._started}', self._binary, self._size,
            accel=self._args.accel, incoming=incoming, extra_args=(
                *self._args.guest_options, '-smp', '2', '-no-reboot',
                '-chardev', f'socket,id=serial,path={path},server=on,wait=off',
                '-serial', 'chardev:serial',
                '-device', 'virtio-balloon-pci,free-page-reporting=on',
                '-device', 'virtio-rng-pci', *self._args.qemu_args)))
        self._console.attach(path)
        return guest

    def _wait_for_load(self, reports: int, timeout: float) -> None:
        before = len(self._console.reports())
        if not self._console.wait_for_reports(reports, timeout):
            raise Wrong(f'the load has not reported for {timeout} seconds')
        trouble = self._console.trouble()
        if trouble:
            raise Wrong(f'the guest says: {trouble}')
        since = self._console.reports()[before:]
        if since[-1].written <= since[0].written:
            raise Wrong('the load does not write any more')

    def boot(self) -> float:
        """Start it; returns the seconds until the load runs."""
        started = time.monotonic()
        self._guest = self._new_qemu(self._stack, incoming=False)
        self._wait_for_load(2, BOOT_TIMEOUT)
        seconds = time.monotonic() - started
        self._wait_for_load(WARM_UP_REPORTS, WARM_UP_REPORTS + REPORT_TIMEOUT)
        return seconds

    def notices_lost_writes(self) -> bool:
        """Spoil what the load has written; whether it complains."""
        lost = lose_writes(self._guest.ram, LOST_PAGES)
        say(f'  {lost} pages of the load made zero')
        self._console.wait_for_reports(REPORT_TIMEOUT, REPORT_TIMEOUT)
        trouble = self._console.trouble()
        say(f'  the guest says: {trouble or "nothing"}')
        return bool(trouble)

    def used(self) -> int:
        """Bytes of its RAM that the guest has used at most, so far."""
        return self._size - min(report.free for report in self._console.reports())

    def last_report(self) -> Any:
        """What the load has said last."""
        return self._console.reports()[-1]

    @staticmethod
    def _allocated(guest: Guest) -> int:
        allocated = guest.sample().allocated
        assert allocated is not None
        return allocated

    def hop(self, name: str) -> Hop:
        """Migrate it to a new QEMU, and end the old one."""
        source = self._guest
        with ExitStack() as stack:
            destination = self._new_qemu(stack, incoming=True)
            # It was a destination before, and has those of that time
            clear_capabilities(source)
            before = self._allocated(source)
            with watched((source, destination), memory_floor(),
                         HOP_TIMEOUT) as watchdog:
                times = Migrate(MODES[name]).run(Session(
                    source, destination, watchdog, self._directory))
            after = self._allocated(source), self._allocated(destination)
            _remove(os.path.join(self._directory, 'state'))
            self._stack.push(stack.pop_all())
        source.kill_now()
        self._guest = destination
        self._wait_for_load(REPORTS, REPORT_TIMEOUT)
        return Hop(name, self.used(), before, *after, times.wall + (times.load or 0))


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python3 -m lab.guest', description=__doc__.split('\n\n', 1)[0])
    add_qemu_arguments(parser)
    add_size_arguments(parser, 64 * GIB, 2 * GIB)
    parser.add_argument('--mode', choices=list(MODES), action='append',
                        dest='modes', help='how to migrate, once (can be '
                        'repeated; default: all of them)')
    parser.add_argument('--rounds', type=int, default=1, metavar='N',
                        help='go through the modes N times')
    args = parser.parse_args()
    args.accel = args.accel or pick_accelerator()
    args.modes = args.modes or list(MODES)
    return args


def memory_needed(size: int, load: Load) -> int:
    """Bytes for two QEMUs with this much guest RAM, if it is kept sparse.

    Linux takes 1/64 of its RAM for what it knows of its pages, and something
    for itself.
    """
    return 2 * (size // 64 + (load.mib + 512) * MIB)


def travel(args: argparse.Namespace) -> int:
    """All hops with the patched QEMU; returns the number of failures."""
    hops: List[Hop] = []
    failures = 0
    with Traveller(args.patched, args.size, args, LOG) as traveller:
        seconds = traveller.boot()
        say(f'patched: a guest of {format_size(args.size)} ({args.accel}), '
            f'{os.path.basename(args.guest_options[1])} has booted in '
            f'{seconds:.0f} seconds')
        for name in args.modes * args.rounds:
            hop = traveller.hop(name)
            hops += [hop]
            say(f'  {name}: {hop.seconds:.1f} seconds, the source has '
                f'{mib(hop.before)} -> {mib(hop.source)} MiB, the destination '
                f'{mib(hop.destination)} MiB; the guest used '
                f'{mib(hop.used)} MiB at most')
            for problem in complaints(hop):
                say(f'FAILED: {name}: {problem}')
                failures += 1
        report = traveller.last_report()
    print(hops_table(hops))
    print(f'{len(hops)} hops, the load wrote {report.written} pages and '
          f'checked {report.checked}, {report.errors} errors, {failures} '
          'complaints about memory')
    return failures


def show_bite(args: argparse.Namespace) -> int:
    """All that is checked has to fail; returns how much of it does not."""
    failures = 0
    with Traveller(args.stock, args.stock_size, args, LOG + '.stock') as traveller:
        traveller.boot()
        hop = traveller.hop('precopy')
        noticed = traveller.notices_lost_writes()
    problems = complaints(hop)
    for problem in problems:
        say(f'  stock, {format_size(args.stock_size)}, as it must be: '
            f'{problem}')
    print(f'stock, {format_size(args.stock_size)}: the source went from '
          f'{mib(hop.before)} to {mib(hop.source)} MiB, the destination has '
          f'{mib(hop.destination)} MiB, the guest used {mib(hop.used)} MiB at '
          'most')
    if len(problems) != 2:
        say('FAILED: nothing is found wrong with both sides of a stock QEMU')
        failures += 1
    if not noticed:
        say('FAILED: the load has not noticed that its pages were changed')
        failures += 1
    return failures


def run(args: argparse.Namespace) -> int:
    """All of it; returns the exit status."""
    ready(args)
    load = Load()
    needed = max(memory_needed(args.size, load), 2 * args.stock_size)
    needed += memory_floor()
    if memory.available() < needed:
        say(f'skipped: {mib(needed)} MiB of memory are needed, and '
            f'{mib(memory.available())} MiB are available')
        return SKIPPED
    why: Optional[str] = memory.check_mappable(args.size)
    if why:
        say(f'skipped: a memfd of {format_size(args.size)} cannot be mapped '
            f'here: {why}')
        return SKIPPED
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='sparse-ram-') as directory:
        try:
            # QEMU's options for kernel, initramfs, and so on
            args.guest_options = prepare(load, directory)
        except Unavailable as err:
            say(f'skipped: {err}')
            return SKIPPED
        try:
            failures = travel(args) + show_bite(args)
        except (Wrong, GuestError, MigrationFailed) as err:
            say(f'FAILED: {err} (console: {os.path.relpath(LOG)}*)')
            failures = 1
    return min(failures, 1)


if __name__ == '__main__':
    sys.exit(run_main('real-guest', lambda: run(parse_args())))
