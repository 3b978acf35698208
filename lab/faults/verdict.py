# SPDX-License-Identifier: GPL-2.0-or-later
"""What has to hold when a migration has come to its end."""

import os
import re
import signal
import time
from collections import Counter
from typing import Dict, Optional, Set

from lab import content
from lab.faults.attempt import GONE, Ending
from lab.faults.cases import Case
from lab.faults.known import MAPPED_RAM_SHORT, POSTCOPY_EARLY, PREEMPT_RECOVER
from lab.faults.peek import Expected
from lab.faults.sides import Layout, Side, Snapshot, allocated, allocation_unit
from lab.memory import PAGE_SIZE
from lab.outcome import Wrong, ending, expect
from lab.qemu import GuestError
from lab.ram import HUGE_PAGE, KINDS, Ram


# Pages that QEMU itself may write to while it loads devices
_SLACK = 16 * PAGE_SIZE

_WARNING = re.compile(r"RAM block '([^']*)': cannot (?:find|punch) holes")


def warnings(log: str) -> Dict[str, int]:
    """How often QEMU has said of each block that the kernel refuses."""
    return Counter(_WARNING.findall(log))


def check_content(what: str, expected: Ram, side: Side) -> None:
    """All bytes of RAM."""
    comparison = content.compare(expected, side.ram)
    expect(comparison.identical, f'{what}: {comparison}')


def check_received(snapshot: Snapshot, expected: Expected, side: Side) -> None:
    """Of a guest that waits for the rest: what is there is right."""
    if side.ram.allocated() is None or side.kind == 'hugetlb':
        return                          # it cannot be told what is there
    written = {offset // PAGE_SIZE for offset, _ in expected.writes}
    with side.ram.opened() as fd:
        for start, end in list(side.ram.extents()):
            for offset in range(start, end, PAGE_SIZE):
                if offset // PAGE_SIZE in written:
                    continue
                expect(os.pread(fd, PAGE_SIZE, side.ram.base + offset)
                       == snapshot.read(offset, PAGE_SIZE),
                       'the destination, which waits for the rest, has a '
                       f'wrong page at {offset:#x}')


def most_allocated(snapshot: Snapshot, kind: str, touched: Set[int],
                   old: Optional[Layout]) -> int:
    """Bytes that a sparse copy may have.

    touched: pages that were accessed.
    old: what was there before and cannot be freed; None: it can.
    """
    unit = allocation_unit(kind)
    units = snapshot.units(unit)
    units |= {page * PAGE_SIZE // unit for page in touched}
    if old:
        units |= {number for start, end in old.data
                  for number in range(start // unit, -(-end // unit))}
    return len(units) * unit + _SLACK


def check_sparse(snapshot: Snapshot, side: Side, touched: Set[int],
                 old: Layout) -> None:
    """The destination has no more than what has data."""
    # Of a transparent huge page, a part cannot always be freed
    can_free = (side.kind != 'tmpfs' and KINDS[side.kind].is_freed
                and allocation_unit(side.kind) == PAGE_SIZE)
    most = most_allocated(snapshot, side.kind, touched, None if can_free else old)
    if side.kind in ('memfd-private', 'anonymous-shared'):
        return              # may have a page twice, or in the kernel's file
    has = allocated(side)
    expect(has <= most, f'the destination has {has} bytes allocated, and '
           f'{most} are enough')


def check_source_grew(before: Optional[int], side: Side) -> None:
    """Migration did not populate the source."""
    now = side.ram.allocated()
    if before is None or now is None or side.kind == 'memfd-private':
        return
    slack = HUGE_PAGE if side.kind == 'hugetlb' else _SLACK
    expect(now <= before + slack, f'the source has grown from {before} to {now} bytes')


def check_survived(source: Side, snapshot: Snapshot, ending: Ending) -> None:
    """The guest is what it was, and can run on."""
    expect(source.ended() is None, 'the source has not survived')
    status = source.status()
    allowed = (('postmigrate',) if ending.source == 'completed'
               else ('prelaunch', 'paused'))
    expect(status in allowed, f'after a migration that {ending.source} the '
           f'source is {status}, and not {" or ".join(allowed)}')
    check_content('the source, after a migration that failed', snapshot, source)
    try:
        source.qmp('cont')
    except GuestError as err:
        raise Wrong(f'the source cannot run on: {err}') from err
    deadline = time.monotonic() + 10
    while source.status() != 'running':
        expect(time.monotonic() < deadline, 'the source does not run on, '
               f'but is {source.status()}')
        time.sleep(0.01)
    time.sleep(0.02)
    source.qmp('stop')
    expect(source.status() == 'paused', 'the source does not stop again')


def check_not_run(destination: Side, ending: Ending) -> None:
    """A destination that did not get everything does not run."""
    status = destination.status()
    expect(status == 'inmigrate' or ending.destination == 'postcopy-paused',
           f'the migration has not completed (source: {ending.source}, '
           f'destination: {ending.destination}), but the destination is '
           f'{status}')


def check_ended(side: Side, case: Case, oom_killed: bool, known: str) -> None:
    """A process that is gone ended as it had to.

    known: the bug that it has run into, if any.
    """
    status = side.ended()
    if status is None:
        return
    if side.killed and status == -signal.SIGKILL:
        return
    if side.name.startswith('destination'):
        if status == 1:
            return
        if oom_killed and status == -signal.SIGKILL:
            return
        if case.fault == 'tmpfs-full' and status == -signal.SIGBUS:
            return
        if known in (MAPPED_RAM_SHORT, POSTCOPY_EARLY, PREEMPT_RECOVER):
            return
    raise Wrong(f'the {side.name} has ended: {ending(status)}')


def check_warnings(log: str, name: str, migrations: int) -> None:
    """At most one for a block and a migration."""
    for block, count in warnings(log).items():
        expect(count <= migrations, f'the {name} has warned {count} times '
               f'about block {block} in {migrations} migrations')


def must_complete(case: Case, ending: Ending, needed: int) -> Optional[str]:
    """Why the migration has to complete in spite of what happened, if so.

    needed: bytes that have data.
    """
    if case.fault == 'none':
        return 'nothing happened'
    if case.fault == 'calls':
        if not case.how.postcopy:
            return 'memory is cleared in place when the kernel refuses'
        calls = {rule.call for _, rule in case.rules}
        if not calls & {'fallocate', 'madvise', 'uffd-copy'}:
            return 'holes need not be found'
        return None
    if case.fault == 'tmpfs-full' and not case.peeks and case.limit >= needed + _SLACK:
        return 'there is enough memory'
    if case.fault in ('pause', 'cut-recover', 'held') and ending.ran:
        return 'both sides are there to recover it'
    if not ending.happened and case.fault not in ('oom', 'tmpfs-full'):
        return 'nothing happened'
    return None


def outcome(ending: Ending) -> str:
    """In short, for the report."""
    if ending.source == ending.destination == 'completed':
        return 'recovered' if ending.recoveries else 'completed'
    return {'postcopy-paused': 'lost in postcopy',
            GONE: 'source gone',
            'completed': 'completed on the source only',
            }.get(ending.source, ending.source)
