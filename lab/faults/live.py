# SPDX-License-Identifier: GPL-2.0-or-later
"""The same with a guest that writes all the time, and checks what it wrote.

The guest is lab/qtest/sparse-writer.S.  It runs on through
migrations that are cancelled or fail, and through postcopy whose channel
breaks and is recovered; in the end it checks all of its pages.
"""

import os
from dataclasses import replace
from typing import Dict, List

from lab import content, host
from lab.cli import memory_floor
from lab.faults import known
from lab.faults.attempt import Attempt, Hang, prepare
from lab.faults.cases import (CLOSE, POSTCOPY, PRECOPY, RESET, SECONDS,
                              TO_DESTINATION, Case, Cut, Dice, Moment)
from lab.faults.peek import Expected
from lab.faults.run import Job, Result, Tools
from lab.faults.sides import Side
from lab.faults.verdict import check_ended
from lab.guest import writer
from lab.memory import KIB, MIB, PAGE_SIZE
from lab.migrate import Watchdog, watched
from lab.outcome import expect


_SIZE = 64 * MIB
_BASE = 8 * MIB
_PAGES = (_SIZE - _BASE - 4 * MIB) // PAGE_SIZE
_FOCUS_MASK = 1023

# Ticks between two writes: 10,000 in a second or so
_TURN = 200000

# Seconds for all migrations of a case
_TIMEOUT = 150.0


def firmware(seed: int) -> bytes:
    """The guest's ROM, with its parameters."""
    return writer.firmware(BASE=_BASE, PAGES=_PAGES, FOCUS_MASK=_FOCUS_MASK,
                           TURN=_TURN, SEED=seed % (1 << 32))


def draw(seed: int) -> List[Case]:
    """Migrations that fail, one after the other, and one that does not."""
    dice = Dice(seed)
    if dice.maybe(0.5):
        mode = dice.choice(POSTCOPY)
        cuts = tuple(
            Cut(0, TO_DESTINATION, dice.randrange(256 * KIB),
                dice.choice((RESET, CLOSE)), dice.maybe(0.5))
            for _ in range(1 + dice.randrange(2)))
        return [Case(seed, mode, dice.choice(('pause', 'cut-recover')),
                     transport=dice.choice(('unix', 'tcp')),
                     bandwidth=2 * MIB, switch=dice.randrange(256 * KIB),
                     moment=Moment(SECONDS, round(dice.uniform(0, 0.3), 3)),
                     pause_destination=dice.maybe(0.3), cuts=cuts)]
    cases = []
    for _ in range(1 + dice.randrange(3)):
        mode = dice.choice(PRECOPY)
        fault = dice.choice(('cancel', 'cancel', 'kill-destination', 'cut'))
        case = Case(seed, mode, fault, bandwidth=4 * MIB,
                    transport=dice.choice(('unix', 'tcp')),
                    return_path=dice.maybe(0.5),
                    moment=Moment(SECONDS, round(dice.uniform(0, 1), 3)))
        if fault == 'cut':
            case = replace(case, moment=None, cuts=(
                Cut(0, TO_DESTINATION, dice.randrange(2 * MIB), RESET,
                    True),))
        cases.append(case)
    return [*cases, Case(seed, dice.choice(PRECOPY), 'none')]


class _Live(Job):
    """One guest at work."""

    def __init__(self, cases: List[Case], tools: Tools):
        super().__init__(cases[0], tools)
        self._cases = cases
        self._serials: Dict[str, writer.Serial] = {}

    def _start(self, name: str, incoming: bool) -> Side:
        rom = os.path.join(self._directory, 'rom')
        with open(rom, 'wb') as file:
            file.write(firmware(self._cases[0].seed))
        serial = self._serials[name] = writer.Serial(
            os.path.join(self._directory, f'{name}-serial'))
        return self._add(Side(
            name, self._tools.qemu, _SIZE, 'memfd', incoming=incoming,
            extra_args=('-bios', rom, *serial.arguments, *self._tools.extra_args)))

    def _wait_for(self, side: Side, what: str, count: int, watchdog: Watchdog) -> None:
        if not self._serials[side.name].wait_for(
                what, count, lambda: not watchdog.tripped):
            raise Hang(f'the guest on the {side.name} does not go on')

    def _let_it_write(self, side: Side, more: int, watchdog: Watchdog) -> None:
        """So many batches."""
        self._wait_for(side, 'B', self._serials[side.name].said('B') + more, watchdog)

    def _poke(self, side: Side, name: str, value: int) -> None:
        side.write(writer.assemble().addresses[name], value.to_bytes(4, 'little'))

    def _run(self) -> None:
        if any(case.how.postcopy for case in self._cases):
            host.require_userfaultfd()
        source = self._start('source', False)
        with watched(self._sides, memory_floor(), _TIMEOUT) as watchdog:
            source.qmp('cont')
            self._let_it_write(source, 4, watchdog)
            for number, case in enumerate(self._cases):
                destination = self._start(f'destination-{number}', True)
                self._migrate(case, number, source, destination, watchdog)
                if self._result.outcome.startswith('QEMU 10.0'):
                    return
                if self._result.outcome:
                    break               # what had to happen came too late
            self._check_by_guest(destination, watchdog)

    def _migrate(self, case: Case, number: int, source: Side,
                 destination: Side, watchdog: Watchdog) -> None:
        prepare(destination, case)
        prepare(source, case, case.bandwidth)
        source.qmp('migrate-set-parameters', **{'downtime-limit': 1000})
        if case.how.postcopy:
            # Let it run as soon as it can
            destination.qmp('cont')
        ending = Attempt(case, source, destination,
                         self._subdirectory(str(number)),
                         Expected(self._snapshot(source)), watchdog).run()
        bug = known.recognize(case, ending, destination.ended())
        for side in (source, destination):
            check_ended(side, case, False, bug)
        self._result.happened |= ending.happened
        if bug:
            self._result.outcome = f'QEMU 10.0: {bug}'
        elif ending.destination == 'completed':
            expect(ending.source == 'completed', 'the destination has '
                   f'completed, and the source has {ending.source}')
            self._result.outcome = ('recovered' if ending.recoveries else 'completed')
            self._check_completed(case, source, destination)
        else:
            expect(case.fault != 'none' and not ending.ran,
                   f'source {ending.source}, destination '
                   f'{ending.destination}')
            if ending.source == 'completed':
                source.qmp('cont')      # as a management tool does
            expect(source.status() == 'running', 'after a migration that '
                   f'{ending.source} the source is {source.status()}')
            self._let_it_write(source, 2, watchdog)

    def _check_completed(self, case: Case, source: Side, destination: Side) -> None:
        expect(source.status() == 'postmigrate',
               f'the source is {source.status()} after the migration')
        if case.how.postcopy:
            return                      # the guest has run on since
        comparison = content.compare(source.ram, destination.ram)
        expect(comparison.identical, str(comparison))

    def _check_by_guest(self, destination: Side, watchdog: Watchdog) -> None:
        """The guest's own opinion, and that it goes on."""
        if destination.status() == 'running':
            self._let_it_write(destination, 2, watchdog)
            destination.qmp('stop')
        self._poke(destination, 'VERIFY', 1)
        destination.qmp('cont')
        self._wait_for(destination, 'V', 1, watchdog)
        self._let_it_write(destination, 2, watchdog)


def run_live(seed: int, tools: Tools) -> Result:
    """Run one guest through its migrations."""
    cases = draw(seed)
    result = _Live(cases, tools).run()
    if result.complaint:
        result.complaint += ' (' + '; '.join(case.describe() for case in cases) + ')'
    return result
