# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole case: guests, migration, verdict, a second attempt."""

import os
import random
import resource
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Optional, Tuple

from lab import host
from lab.cgroup import Cgroup
from lab.cli import memory_floor
from lab.faults import known, sides, verdict
from lab.faults.attempt import GONE, Attempt, Ending, Hang, prepare
from lab.faults.cases import Case
from lab.faults.failcalls import FailCalls
from lab.faults.peek import Expected
from lab.faults.sides import Layout, Side, Snapshot, stacks
from lab.memory import GIB, PAGE_SIZE
from lab.migrate import MigrationAborted, Watchdog, address_of, watched
from lab.modes import TCP
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, Unavailable, Wrong, expect
from lab.qemu import GuestError


# Seconds for the migrations of a case, which take two
TIMEOUT = 60.0

# Huge pages that a case may use: three QEMUs with 16 MiB each
_HUGE_PAGES = 24


@dataclass(frozen=True)
class Tools:
    """What all cases need.

    qemu: the binary.  library: fail-calls.so.
    timeout: seconds for the migrations of a case.
    hang_seconds: after which a side that waits for multifd counts as hanging.
    sparse: RAM has to stay sparse; not so with a stock QEMU.
    after: is called when a migration has ended, before anything is checked;
    to see that the checks notice.
    """
    qemu: str
    library: str
    extra_args: Tuple[str, ...] = ()
    timeout: float = TIMEOUT
    hang_seconds: float = known.HANG_SECONDS
    sparse: bool = True
    after: Optional[Callable[[Side, Side, Ending], None]] = None


@dataclass
class Result:
    """What came of a case.

    outcome: of the first migration, in short.
    complaint: what was wrong; '' if nothing.
    skipped: why it could not be run; '' if it was.
    logs: what the QEMUs have said, by name.
    failed_calls: how many calls failed, by call and errno.
    """
    case: Case
    outcome: str = ''
    complaint: str = ''
    skipped: str = ''
    seconds: float = 0.0
    happened: bool = False
    peeks: int = 0
    logs: Dict[str, str] = field(default_factory=dict)
    failed_calls: Counter[str] = field(default_factory=Counter)

    def outcome_of(self, name: str) -> Outcome:
        """As that of a test of this name."""
        status = (FAILED if self.complaint else SKIPPED if self.skipped else PASSED)
        return Outcome(name, status, self.complaint or self.skipped, self.seconds)


def _no_core_dumps() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


class Job:
    """The QEMUs of a case, while it runs.

    directory: for its files.  stack: of what is to be undone afterwards.
    """

    def __init__(self, case: Case, tools: Tools):
        self._tools = tools
        self._result = Result(case)
        self._directory = ''
        self._stack = ExitStack()
        self._sides: List[Side] = []

    def run(self) -> Result:
        """From start to end; nothing is left behind, whatever comes of it."""
        result = self._result
        _no_core_dumps()
        began = time.monotonic()
        with self._stack:
            self._directory = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix='faults-'))
            try:
                try:
                    self._run()
                except Hang:
                    self._look_at_hang()
                    raise
                finally:
                    self._finish()
            except Unavailable as err:
                result.skipped = str(err)
            except (Wrong, Hang, MigrationAborted, GuestError, RuntimeError,
                    OSError, ValueError) as err:
                result.complaint = f'{type(err).__name__}: {err}'
        result.seconds = time.monotonic() - began
        return result

    def _run(self) -> None:
        """Raises Wrong, Hang, Unavailable, GuestError, MigrationAborted."""
        raise NotImplementedError

    def _add(self, side: Side) -> Side:
        """Start a QEMU that is stopped when the case ends."""
        self._stack.enter_context(side)
        self._sides.append(side)
        return side

    def _snapshot(self, side: Side) -> Snapshot:
        snapshot = Snapshot(side.ram)
        self._stack.callback(snapshot.close)
        return snapshot

    def _subdirectory(self, name: str) -> str:
        path = os.path.join(self._directory, name)
        os.mkdir(path)
        return path

    def _look_at_hang(self) -> None:
        """Before all is killed."""
        for side in self._sides:
            if side.ended() is None and not side.stacks:
                side.stacks = stacks(side.pid, side.use_gdb)

    def _finish(self) -> None:
        """Kill all, look at what they have said."""
        for side in self._sides:
            log = side.end()
            self._result.logs[side.name] = log
            if side.stacks:
                self._result.logs[f'{side.name}: threads'] = side.stacks
            migrations = 2 if side.name == 'source' else 1
            verdict.check_warnings(log, side.name, migrations)


class _Run(Job):
    """One case at work."""
    _source: Side
    _destination: Side
    _before: Optional[int]          # bytes that the source had allocated
    _sent: Snapshot                 # of the source
    _old: Layout                    # of the destination

    def __init__(self, case: Case, tools: Tools):
        super().__init__(case, tools)
        self._case = case
        self._dice = random.Random(case.seed)
        self._tmpfs = ''
        self._cgroup: Optional[Cgroup] = None

    # Getting ready

    def _check_available(self) -> None:
        case = self._case
        if case.source == 'hugetlb':
            self._stack.enter_context(host.locked_huge_pages(_HUGE_PAGES))
        # With a second destination
        if 'shm-file' in (case.source, case.destination):
            host.require_shm(3 * case.size)
        if case.how.postcopy:
            host.require_userfaultfd()
        if case.fault == 'oom':
            self._cgroup = self._stack.enter_context(Cgroup(GIB))
        if case.fault == 'tmpfs-full':
            self._tmpfs = self._stack.enter_context(
                sides.small_tmpfs(self._directory, case.limit))

    def _start(self, name: str, kind: str, incoming: bool, *,
               fails: bool = False, old: Optional[Layout] = None,
               cgroup: Optional[Cgroup] = None) -> Side:
        path = ''
        if kind == 'shm-file':
            path = sides.ram_path(self._directory, name)
            self._stack.callback(_remove, path)
            if old:
                sides.old_file(path, self._case.size, self._dice, old)
        elif kind == 'tmpfs':
            path = os.path.join(self._tmpfs, 'ram')
        fail_calls = None
        if fails or kind == 'anonymous-shared':
            fail_calls = FailCalls(self._tools.library, self._directory, name)
            self._stack.callback(fail_calls.close)
        side = self._add(Side(
            name, self._tools.qemu, self._case.size, kind, path=path,
            incoming=incoming, fail_calls=fail_calls, cgroup=cgroup,
            extra_args=self._tools.extra_args))
        if old and kind != 'shm-file':
            sides.write_layout(side, self._dice, replace(old, zeroes=()))
        return side

    def _layout(self, data: int, zeroes: int = 0) -> Layout:
        return sides.draw_layout(self._dice, self._case.size, data, zeroes)

    # The migration

    def _run(self) -> None:
        case = self._case
        self._check_available()
        source = self._source = self._start(
            'source', case.source, False, fails='source' in case.fails_calls_of)
        sides.write_layout(source, self._dice, self._layout(case.data, case.zeroes))
        # What the kernel is asked about first, and refuses, is data
        source.write(0, self._dice.randbytes(PAGE_SIZE))
        self._old = self._layout(case.old_data)
        self._destination = self._start(
            'destination', case.destination, True, old=self._old,
            fails='destination' in case.fails_calls_of, cgroup=self._cgroup)
        if self._cgroup:
            self._cgroup.leave(case.limit)
        with watched(self._sides, memory_floor(), self._tools.timeout) as watchdog:
            self._sent = self._snapshot(source)
            self._migrate(watchdog)

    def _migrate(self, watchdog: Watchdog) -> None:
        """Once, and once more if the source has its guest still."""
        case, source, destination = self._case, self._source, self._destination
        prepare(destination, case)
        prepare(source, case, case.bandwidth)
        for side in (source, destination):
            rules = [rule for name, rule in case.rules if name == side.name]
            if rules:
                side.arm(rules)
        self._before = source.ram.allocated()
        attempt = Attempt(case, source, destination, self._directory,
                          Expected(self._sent), watchdog)
        ending, bug = self._attempt(attempt)
        for side in (source, destination):
            if side.fail_calls:
                side.fail_calls.disarm()
                for rule, failed in side.fail_calls.failed():
                    self._result.failed_calls[f'{rule.call} {rule.error}'] += failed
        if case.fault in ('oom', 'tmpfs-full'):
            ending.happened = ending.destination != 'completed'
        if self._tools.after:
            self._tools.after(source, destination, ending)
        self._result.outcome = (f'QEMU 10.0: {bug}' if bug else verdict.outcome(ending))
        self._result.happened = ending.happened
        self._check(attempt, bug)
        self._result.peeks = sum(peeker.done for peeker in attempt.peekers)
        lost = ending.destination not in ('completed', 'postcopy-paused')
        if bug in (known.POSTCOPY_END, known.MULTIFD_CANCEL, known.PREEMPT_PONG) or \
                not (ending.source in ('failed', 'cancelled') or
                     ending.source == 'completed' and lost):
            return
        if case.fault == 'cancel-early' and ending.source == 'cancelled':
            self._same_pair(watchdog)
        else:
            verdict.check_survived(source, self._sent, ending)
            self._try_again(watchdog)

    def _attempt(self, attempt: Attempt) -> Tuple[Ending, str]:
        """Returns also the bug of QEMU's that it has run into."""
        how, seconds = self._case.how, self._tools.hang_seconds
        watches = []
        if how.multifd and not how.file:
            watches = [
                known.MultifdWatch(self._source, how.channels - 1,
                                   self._destination, seconds),
                known.MultifdWatch(self._destination, how.channels - 1,
                                   seconds=seconds)]
        for watch in watches:
            watch.start()
        try:
            ending = attempt.run()
        finally:
            for watch in watches:
                watch.stop()
        found = [watch.found for watch in watches if watch.found]
        return ending, (found[0] if found else
                        known.recognize(self._case, ending,
                                        self._destination.ended()))

    def _check(self, attempt: Attempt, bug: str) -> None:
        case, ending = self._case, attempt.ending
        source, destination = self._source, self._destination
        oom_killed = bool(self._cgroup and self._cgroup.oom_kills())
        for side in (source, destination):
            verdict.check_ended(side, case, oom_killed, bug)
        why = not bug and verdict.must_complete(
            case, ending, len(self._sent.units(PAGE_SIZE)) * PAGE_SIZE)
        completed = ending.destination == 'completed'
        expect(not why or completed and ending.source == 'completed',
               f'source {ending.source}, destination {ending.destination}, '
               f'although {why}')
        expect(case.fault != 'held' or ending.held > 0,
               'what was accessed while the channel was broken was not '
               'answered before postcopy ended')
        for peeker in attempt.peekers:
            expect(not peeker.wrong, peeker.wrong or '')
        if ending.source != GONE:
            expect(source.ended() is None, 'the source has not survived')
            verdict.check_content('the source, after the migration', self._sent, source)
            if 'source' not in case.fails_calls_of and self._tools.sparse:
                verdict.check_source_grew(self._before, source)
        if completed:
            attempt.join_peekers()
            self._check_completed(attempt.expected)
        elif ending.destination != GONE:
            verdict.check_not_run(destination, ending)
            if ending.destination == 'postcopy-paused':
                verdict.check_received(self._sent, attempt.expected, destination)
        if ending.source == 'completed':
            expect(source.status() == 'postmigrate',
                   f'the source is {source.status()} after the migration')

    def _check_completed(self, expected: Expected) -> None:
        # What the source was before, or paused, because of -S
        destination = self._destination
        status = destination.status()
        expect(status in ('prelaunch', 'paused'),
               f'after the migration, the destination is {status}')
        wanted = Snapshot(self._sent)
        try:
            for offset, data in expected.writes:
                wanted.patch(offset, data)
            verdict.check_content('the destination', wanted, destination)
            if 'destination' not in self._case.fails_calls_of and self._tools.sparse:
                verdict.check_sparse(wanted, destination, expected.touched, self._old)
        finally:
            wanted.close()

    # Afterwards

    def _same_pair(self, watchdog: Watchdog) -> None:
        """It was cancelled before the destination has heard of it."""
        source, destination = self._source, self._destination
        prepare(source, self._case)
        uri = destination.query_migrate()['socket-address'][-1]
        source.qmp('migrate', uri=(
            f'unix:{uri["path"]}' if uri['type'] == 'unix'
            else address_of(destination, TCP)))
        while source.query_migrate()['status'] not in ('completed', 'failed') or \
                destination.status() == 'inmigrate':
            if watchdog.tripped:
                raise Hang(f'the same pair again: {watchdog.tripped}')
            time.sleep(0.01)
        verdict.check_content('the destination, the same pair again',
                              self._sent, destination)

    def _try_again(self, watchdog: Watchdog) -> None:
        """With a new destination, and without faults."""
        case, source = self._case, self._source
        kind = case.destination
        if kind in ('tmpfs', 'anonymous-shared'):
            kind = 'memfd'
        second = Case(case.seed, case.second_mode or case.mode, 'none',
                      source=case.source, destination=kind, size=case.size,
                      transport=case.transport, return_path=case.return_path)
        snapshot = self._snapshot(source)
        before = source.ram.allocated()
        destination = self._start('destination-2', kind, True)
        prepare(destination, second)
        prepare(source, second, second.bandwidth)
        ending = Attempt(second, source, destination, self._subdirectory('second'),
                         Expected(snapshot), watchdog).run()
        expect(ending.source == ending.destination == 'completed',
               f'the second attempt ({case.second_mode}): source '
               f'{ending.source}, destination {ending.destination}')
        for side in (source, destination):
            verdict.check_content(f'the {side.name}, after the second attempt',
                                  snapshot, side)
        if self._tools.sparse:
            verdict.check_source_grew(before, source)
            verdict.check_sparse(snapshot, destination, set(), Layout((), ()))
        destination.qmp('cont')
        expect(destination.status() == 'running', 'the second destination cannot run')


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def run_case(case: Case, tools: Tools) -> Result:
    """Run one case."""
    return _Run(case, tools).run()
