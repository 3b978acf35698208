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
from lab.faults.cases import MODES, Case
from lab.faults.failcalls import FailCalls
from lab.faults.peek import Expected
from lab.faults.sides import Layout, Side, Snapshot, stacks
from lab.memory import GIB, PAGE_SIZE
from lab.migrate import MigrationAborted, Watchdog, address_of, watched
from lab.modes import TCP
from lab.outcome import (FAILED, PASSED, SKIPPED, Outcome, Unavailable, Wrong,
                         expect)
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
        status = (FAILED if self.complaint else SKIPPED if self.skipped
                  else PASSED)
        return Outcome(name, status, self.complaint or self.skipped,
                       self.seconds)


def _no_core_dumps() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


class Job:
    """The QEMUs of a case, while it runs.

    directory: for its files.  stack: of what is to be undone afterwards.
    """

    def __init__(self, directory: str, result: Result, stack: ExitStack):
        self._directory = directory
        self._result = result
        self._stack = stack
        self._sides: List[Side] = []

    def run(self) -> None:
        """Raises Wrong, Hang, Unavailable, GuestError, MigrationAborted."""
        raise NotImplementedError

    def look_at_hang(self) -> None:
        """Before all is killed."""
        for side in self._sides:
            if side.ended() is None and not side.stacks:
                side.stacks = stacks(side.pid, side.use_gdb)

    def finish(self) -> None:
        """Kill all, look at what they have said."""
        for side in self._sides:
            log = side.end()
            self._result.logs[side.name] = log
            if side.stacks:
                self._result.logs[f'{side.name}: threads'] = side.stacks
            migrations = 2 if side.name == 'source' else 1
            verdict.check_warnings(log, side.name, migrations)


def run_job(result: Result,
            make: Callable[[str, Result, ExitStack], Job]) -> Result:
    """Run a job; nothing is left behind, whatever comes of it."""
    _no_core_dumps()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='faults-') as directory, \
         ExitStack() as stack:
        job = make(directory, result, stack)
        try:
            try:
                job.run()
            except Hang:
                job.look_at_hang()
                raise
            finally:
                job.finish()
        except Unavailable as err:
            result.skipped = str(err)
        except (Wrong, Hang, MigrationAborted, GuestError, RuntimeError,
                OSError, ValueError) as err:
            result.complaint = f'{type(err).__name__}: {err}'
    result.seconds = time.monotonic() - began
    return result


class _Run(Job):
    """One case at work."""

    def __init__(self, case: Case, tools: Tools, directory: str,
                 result: Result, stack: ExitStack):
        super().__init__(directory, result, stack)
        self._case = case
        self._tools = tools
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
        """Start a QEMU that is stopped when the case ends."""
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
        side = Side(name, self._tools.qemu, self._case.size, kind, path=path,
                    incoming=incoming, fail_calls=fail_calls, cgroup=cgroup,
                    extra_args=self._tools.extra_args)
        self._stack.enter_context(side)
        self._sides.append(side)
        if old and kind != 'shm-file':
            sides.write_layout(side, self._dice, replace(old, zeroes=()))
        return side

    def _layout(self, data: int, zeroes: int = 0) -> Layout:
        return sides.draw_layout(self._dice, self._case.size, data, zeroes)

    # The migration

    def run(self) -> None:
        case = self._case
        self._check_available()
        source = self._start('source', case.source, False,
                             fails='source' in case.fails_calls_of)
        sides.write_layout(source, self._dice,
                           self._layout(case.data, case.zeroes))
        # What the kernel is asked about first, and refuses, is data
        source.write(0, self._dice.randbytes(PAGE_SIZE))
        old = self._layout(case.old_data)
        destination = self._start(
            'destination', case.destination, True, old=old,
            fails='destination' in case.fails_calls_of, cgroup=self._cgroup)
        if self._cgroup:
            self._cgroup.leave(case.limit)
        with watched(self._sides, memory_floor(),
                     self._tools.timeout) as watchdog:
            snapshot = self._snapshot(source)
            if self._migrate(source, destination, snapshot, old, watchdog):
                self._try_again(source, watchdog)

    def _snapshot(self, source: Side) -> Snapshot:
        snapshot = Snapshot(source.ram)
        self._stack.callback(snapshot.close)
        return snapshot

    def _migrate(self, source: Side, destination: Side, snapshot: Snapshot,
                 old: Layout, watchdog: Watchdog) -> bool:
        """Whether the source is to try again."""
        case = self._case
        prepare(destination, case)
        prepare(source, case, case.bandwidth)
        for side in (source, destination):
            rules = [rule for name, rule in case.rules if name == side.name]
            if rules:
                side.arm(rules)
        before = source.ram.allocated()
        expected = Expected(snapshot)
        attempt = Attempt(case, source, destination, self._directory,
                          expected, watchdog)
        ending, bug = self._attempt(attempt, source, destination)
        for side in (source, destination):
            if side.fail_calls:
                side.fail_calls.disarm()
                self._count(side)
        if case.fault in ('oom', 'tmpfs-full'):
            ending.happened = ending.destination != 'completed'
        if self._tools.after:
            self._tools.after(source, destination, ending)
        self._result.outcome = (f'QEMU 10.0: {bug}' if bug
                                else verdict.outcome(ending))
        self._result.happened = ending.happened
        self._check(source, destination, snapshot, old, attempt, before, bug)
        self._result.peeks = sum(peeker.done for peeker in attempt.peekers)
        if bug in (known.POSTCOPY_END, known.MULTIFD_CANCEL,
                   known.PREEMPT_PONG):
            return False
        lost = ending.destination not in ('completed', 'postcopy-paused')
        if ending.source in ('failed', 'cancelled') or \
                ending.source == 'completed' and lost:
            if case.fault == 'cancel-early' and ending.source == 'cancelled':
                self._same_pair(source, destination, snapshot, watchdog)
                return False
            verdict.check_survived(source, snapshot, ending)
            return True
        return False

    def _attempt(self, attempt: Attempt, source: Side,
                 destination: Side) -> Tuple[Ending, str]:
        """Returns also the bug of QEMU's that it has run into."""
        how = self._case.how
        watches = []
        if not how.file and 'multifd' in how.capabilities:
            watches = [
                known.MultifdWatch(source, how.channels - 1, destination,
                                   self._tools.hang_seconds),
                known.MultifdWatch(destination, how.channels - 1,
                                   seconds=self._tools.hang_seconds)]
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
                                        destination.ended()))

    def _count(self, side: Side) -> None:
        assert side.fail_calls
        for rule, failed in side.fail_calls.failed():
            self._result.failed_calls[f'{rule.call} {rule.error}'] += failed

    def _check(self, source: Side, destination: Side, snapshot: Snapshot,
               old: Layout, attempt: Attempt, before: Optional[int],
               bug: str) -> None:
        case, ending, expected = self._case, attempt.ending, attempt.expected
        oom_killed = bool(self._cgroup and self._cgroup.oom_kills())
        for side in (source, destination):
            verdict.check_ended(side, case, oom_killed, bug)
        why = not bug and verdict.must_complete(
            case, ending, len(snapshot.units(PAGE_SIZE)) * PAGE_SIZE)
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
            verdict.check_content('the source, after the migration',
                                  snapshot, source)
            if 'source' not in case.fails_calls_of and self._tools.sparse:
                verdict.check_source_grew(before, source)
        if completed:
            attempt.join_peekers()
            self._check_completed(destination, snapshot, old, expected)
        elif ending.destination != GONE:
            verdict.check_not_run(destination, ending)
            if ending.destination == 'postcopy-paused':
                verdict.check_received(snapshot, expected, destination)
        if ending.source == 'completed':
            expect(source.status() == 'postmigrate',
                   f'the source is {source.status()} after the migration')

    def _check_completed(self, destination: Side, snapshot: Snapshot,
                         old: Layout, expected: Expected) -> None:
        # What the source was before, or paused, because of -S
        status = destination.status()
        expect(status in ('prelaunch', 'paused'),
               f'after the migration, the destination is {status}')
        wanted = Snapshot(snapshot)
        try:
            for offset, data in expected.writes:
                wanted.patch(offset, data)
            verdict.check_content('the destination', wanted, destination)
            if 'destination' not in self._case.fails_calls_of and \
                    self._tools.sparse:
                verdict.check_sparse(wanted, destination, expected.touched,
                                     old)
        finally:
            wanted.close()

    # Afterwards

    def _same_pair(self, source: Side, destination: Side,
                   snapshot: Snapshot, watchdog: Watchdog) -> None:
        """It was cancelled before the destination has heard of it."""
        again = replace(self._case, fault='none', exit_on_error=True,
                        moment=None, bandwidth=0)
        prepare(source, again)
        uri = destination.query_migrate()['socket-address'][-1]
        source.qmp('migrate', uri=(
            f'unix:{uri["path"]}' if uri['type'] == 'unix'
            else address_of(destination, TCP)))
        while source.query_migrate()['status'] not in ('completed', 'failed'):
            if watchdog.tripped:
                raise Hang(f'the same pair again: {watchdog.tripped}')
            time.sleep(0.01)
        while destination.status() == 'inmigrate':
            if watchdog.tripped:
                raise Hang(f'the same pair again: {watchdog.tripped}')
            time.sleep(0.01)
        verdict.check_content('the destination, the same pair again',
                              snapshot, destination)

    def _try_again(self, source: Side, watchdog: Watchdog) -> None:
        """With a new destination, and without faults."""
        case = self._case
        mode = MODES[case.second_mode or case.mode]
        kind = case.destination
        if kind in ('tmpfs', 'anonymous-shared'):
            kind = 'memfd'
        second = Case(case.seed, case.second_mode or case.mode, 'none',
                      source=case.source, destination=kind, size=case.size,
                      transport=case.transport, return_path=case.return_path)
        directory = os.path.join(self._directory, 'second')
        os.mkdir(directory)
        snapshot = self._snapshot(source)
        before = source.ram.allocated()
        destination = self._start('destination-2', kind, True)
        assert mode is second.how
        prepare(destination, second)
        prepare(source, second, second.bandwidth)
        expected = Expected(snapshot)
        attempt = Attempt(second, source, destination, directory, expected,
                          watchdog)
        ending = attempt.run()
        expect(ending.source == ending.destination == 'completed',
               f'the second attempt ({case.second_mode}): source '
               f'{ending.source}, destination {ending.destination}')
        verdict.check_content('the source, after the second attempt',
                              snapshot, source)
        verdict.check_content('the destination, after the second attempt',
                              snapshot, destination)
        if self._tools.sparse:
            verdict.check_source_grew(before, source)
            verdict.check_sparse(snapshot, destination, set(), Layout((), ()))
        destination.qmp('cont')
        expect(destination.status() == 'running',
               'the second destination cannot run')


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def run_case(case: Case, tools: Tools) -> Result:
    """Run one case."""
    return run_job(Result(case), lambda directory, result, stack:
                   _Run(case, tools, directory, result, stack))
