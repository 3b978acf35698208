# SPDX-License-Identifier: GPL-2.0-or-later
"""Run test suites and print what they did.

The suites: unit (the unit tests without QEMU, plain and with sanitizers),
qtest (this project's migration tests, on the patched and on the stock QEMU),
qemu (QEMU's own migration-test on the patched QEMU), fuzz (damaged streams for
the patched QEMU, for half a minute), random (a few random migrations), faults
(migrations that fail, a fixed set), old-new (a few migrations between the patched
and the stock QEMU, and their streams), scripts (this project's Python code),
style; "all" is all of these.

"long" is what takes hours, in suites of its own: random-long (a thousand random
migrations), faults-long (failures drawn at random), old-new-long (all migrations
between old and new, QEMU 7.2 included, which is fetched), guests-long (a guest
that writes all the time, in all modes, with TCG and KVM), real-guest (Linux,
migrated back and forth), asan and tsan (this project's migration tests, of which
tsan takes those of multifd and postcopy, with a QEMU that is built with sanitizers
for it).  "asan-list" and "tsan-list" print what the stock QEMU reports in these
tests, as lab/ci/asan.supp and tsan.supp list it.  The binaries must have been
built, see the Makefile.

The last line is "N passed, N failed, N skipped"; the exit status is 0 only if
nothing failed and every suite ran something.
"""

import argparse
import collections
import fnmatch
import functools
import glob
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import (Any, Callable, Dict, List, Optional, Sequence, TextIO,
                    Tuple)

from lab import host, jobs, memory, terminal
from lab.base import BUILD, PATCHES, ROOT
from lab.ci import sanitizers, tap
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, ending
from lab.qemu import pick_accelerator

LOGS = os.path.join(BUILD, 'logs/tests')
PATCHED = os.path.join(BUILD, 'patched')
STOCK = os.path.join(BUILD, 'stock')
PATCHED_SOURCE = os.path.join(BUILD, 'patched-src')
STOCK_FAILURES = os.path.join(ROOT, 'tests/stock-failures.txt')

OWN_TESTS = '/x86_64/migration/sparse/'
LONG_GUEST_TESTS = OWN_TESTS + 'stress/long/'

# Seconds without a sign of life: a live guest under TCG on a busy machine
# needs a minute, a memory hog of a test on a slow one two.
GTEST_TIMEOUT = 300
UNIT_TIMEOUT = 300

# The cases of 'make check': seeds that together have all modes
RANDOM_CASES = ('--first', '240', '--cases', '40')

# Those of them that are tried with a promise broken on purpose
BROKEN_CASES = ('--first', '240', '--cases', '16')

# Seconds without a migration that has ended; each has a timeout of its own, and
# those between old and new can take some attempts
RIG_TIMEOUT = 1200

# What a program ends with if something that it needs is not to be had
UNAVAILABLE = 77

# How long damaged streams are fed to QEMU, in seconds
FUZZ_TIME = 30

# How many migrations fail at random, and how many with a guest that runs
RANDOM_FAULTS = 500
LIVE_FAULTS = 20

# What a test may need at once: two guests that are filled.
MEMORY_PER_JOB = 4 << 30


def shown(path: str) -> str:
    """A path as the user knows it."""
    return os.path.relpath(path, ROOT)


class Report:
    """Collects the outcomes of all suites; prints them as they come."""

    WORDS = {PASSED: ('ok', terminal.GREEN), FAILED: ('FAILED', terminal.RED),
             SKIPPED: ('skipped', terminal.YELLOW)}

    def __init__(self) -> None:
        self.outcomes: List[Tuple[str, Outcome]] = []
        self._lock = threading.Lock()
        self._status = terminal.Status(sys.stdout)
        self._done = 0

    def add(self, suite: str, outcome: Outcome) -> None:
        """One more outcome."""
        word, colour = self.WORDS[outcome.status]
        word = terminal.paint(f'{word:8}', colour, sys.stdout)
        reason = f': {outcome.reason}' if outcome.reason else ''
        with self._lock:
            self.outcomes.append((suite, outcome))
            self._status.clear()
            print(f'{word}{outcome.seconds:6.1f} s  '
                  f'{suite}: {outcome.name}{reason}', flush=True)

    def progress(self, name: str) -> None:
        """One more is done; what became of it comes when its program ends."""
        with self._lock:
            self._done += 1
            self._status.show(f'{self._done} tests done, the last one: {name}')

    def count(self, status: str, suite: Optional[str] = None) -> int:
        """How many had this status."""
        return sum(outcome.status == status and suite in (None, name)
                   for name, outcome in self.outcomes)

    def close(self) -> int:
        """Prints what should not be overlooked, and the sum."""
        for status, title in ((SKIPPED, 'Skipped'), (FAILED, 'Failed')):
            reasons: Dict[str, List[str]] = {}
            for suite, outcome in self.outcomes:
                if outcome.status == status:
                    log = (f' (see {shown(outcome.log)})'
                           if outcome.log and status == FAILED else '')
                    reasons.setdefault(outcome.reason, []).append(
                        f'{suite}: {outcome.name}{log}')
            if reasons:
                self._status.clear()
                print(f'\n{title}:')
            for reason, names in reasons.items():
                print(f'  {reason or "no reason given"}')
                for name in names:
                    print(f'    {name}')
        if self.count(FAILED):
            print(f'\nThe machine: {room_left()}')
        print(f'\n{self.count(PASSED)} passed, {self.count(FAILED)} failed, '
              f'{self.count(SKIPPED)} skipped', flush=True)
        return 1 if self.count(FAILED) else 0


class Accelerator:
    """Decides between KVM and TCG for QEMU's test programs.

    They take KVM wherever /dev/kvm is.  Where the processor has no hardware
    virtualization to offer, that is slower than TCG, so KVM is hidden from
    them: in a mount namespace, something that is not KVM lies over it.
    """

    def __init__(self) -> None:
        self.prefix: List[str] = []
        self.description = self._choose()

    def _choose(self) -> str:
        if not os.access('/dev/kvm', os.R_OK | os.W_OK):
            return 'TCG (there is no usable /dev/kvm)'
        wanted = os.environ.get('SPARSE_RAM_ACCEL')
        if wanted not in (None, 'kvm', 'tcg'):
            sys.exit(f'run-tests: SPARSE_RAM_ACCEL={wanted} is neither kvm nor tcg')
        if (wanted or pick_accelerator()) == 'kvm':
            return 'KVM'
        user = [] if os.geteuid() == 0 else ['--map-root-user']
        prefix = ['unshare', '--mount', *user, 'sh', '-ec',
                  'mount --bind /dev/null /dev/kvm; exec "$@"', 'sh']
        if subprocess.run([*prefix, 'true'], check=False,
                          stderr=subprocess.DEVNULL).returncode:
            return 'KVM (TCG would be faster, but /dev/kvm cannot be hidden)'
        self.prefix = prefix
        return 'TCG'


def room_left() -> str:
    """What a test cannot tell of: that there is no room left."""
    free = {where: shutil.disk_usage(where).free
            for where in (ROOT, tempfile.gettempdir(), '/dev/shm')
            if os.path.isdir(where)}
    return ', '.join([f'{memory.available() >> 20} MiB of memory available',
                      *(f'{size >> 20} MiB free in {where}'
                        for where, size in free.items())])


def job_count() -> int:
    """How many test programs to run side by side."""
    return int(os.environ.get('JOBS') or jobs.fitting(MEMORY_PER_JOB))


def open_log(suite: str, name: str) -> TextIO:
    """A log for one program."""
    directory = os.path.join(LOGS, suite.replace(' ', '-'))
    os.makedirs(directory, exist_ok=True)
    return open(os.path.join(directory, f'{name}.log'), 'w', encoding='utf-8')


# QEMU's own program, with those of our tests that are mailed, and ours
TEST_PROGRAMS = ('./tests/qtest/migration-test', './tests/qtest/sparse-lab-test')


class MigrationTest:
    """The migration test programs of a build, with some QEMU."""

    def __init__(self, qemu: str, accelerator: Optional[Accelerator],
                 report: Optional[Report] = None,
                 options: Sequence[str] = (), build: str = PATCHED,
                 extra: Optional[Dict[str, str]] = None) -> None:
        """@accelerator: if there is none, the tests choose theirs
        @report: is told of each test that is done
        @extra: for the environment
        """
        prefix = accelerator.prefix if accelerator else []
        self.progress = report.progress if report else lambda name: None
        self.build = build
        self.prefix, self.options = prefix, options
        self.program_of: Dict[str, str] = {}
        self.env = dict(os.environ, QTEST_QEMU_BINARY=qemu,
                        PYTHON=sys.executable, G_TEST_DBUS_DAEMON='',
                        **(extra or {}))
        image_tool = os.path.join(build, 'qemu-img')
        if os.path.exists(image_tool):
            self.env['QTEST_QEMU_IMG'] = image_tool

    def list(self) -> List[str]:
        """The paths of all tests of the set that the options choose."""
        for program in TEST_PROGRAMS:
            # A step of the series need not have ours.
            if not os.path.exists(os.path.join(self.build, program)):
                continue
            result = subprocess.run([*self.prefix, program, *self.options, '-l'],
                                    cwd=self.build, env=self.env,
                                    stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT,
                                    text=True, check=False)
            if result.returncode:
                raise RuntimeError(
                    f'{program} -l: {ending(result.returncode)}: '
                    + result.stdout.strip().rpartition('\n')[2])
            for line in result.stdout.splitlines():
                if line.startswith('/'):
                    self.program_of[line.split()[0]] = program
        return list(self.program_of)

    def _run_chunk(self, suite: str, paths: List[str],
                   add: Callable[[Outcome], None]) -> None:
        # A crash ends the program, not the chunk: the rest gets a new one.
        while paths:
            name = paths[0].strip('/').replace('/', '-')
            select = [arg for path in paths for arg in ('-p', path)]
            # A test that crashes does not remove its files.
            with open_log(suite, name) as log, \
                 tempfile.TemporaryDirectory(
                     prefix='sparse-ram-',
                     ignore_cleanup_errors=True) as directory:
                program = self.program_of[paths[0]]
                outcomes = tap.run([*self.prefix, program, *self.options,
                                    '--tap', '-k', *select],
                                   log, GTEST_TIMEOUT, expected=paths,
                                   cwd=self.build,
                                   env=dict(self.env, TMPDIR=directory),
                                   progress=self.progress)
            for outcome in outcomes:
                outcome.log = log.name
            seen = {outcome.name: outcome for outcome in outcomes}
            for path in paths:
                if path in seen:
                    add(seen[path])
            rest = [path for path in paths if path not in seen]
            if not rest:
                # Such as a crash when all tests were done.
                for outcome in outcomes:
                    if outcome.name not in paths and not outcome.reported:
                        outcome.name = f'the end of the program with {name}'
                        add(outcome)
            if len(rest) == len(paths):
                for path in rest:
                    add(Outcome(path, FAILED, 'did not run'))
                return
            paths = rest

    def run(self, suite: str, paths: List[str], chunks_per_job: int,
            add: Callable[[Outcome], None]) -> None:
        """Runs the tests side by side; @add is called for each."""
        at_a_time = job_count()
        size = max(1, len(paths) // (at_a_time * chunks_per_job))
        if not self.program_of:
            self.list()
        chunks = []
        for program in TEST_PROGRAMS:
            own = [path for path in paths if self.program_of[path] == program]
            chunks += [own[at:at + size] for at in range(0, len(own), size)]
        for _ in jobs.side_by_side(lambda chunk: self._run_chunk(suite, chunk, add),
                                   chunks, at_a_time):
            pass


# --- the suites ---

def meson_tests(build: str) -> List[Dict[str, Any]]:
    """What meson knows of a build directory's tests."""
    with open(os.path.join(build, 'meson-info/intro-tests.json'),
              encoding='utf-8') as file:
        return json.load(file)


def run_meson_test(suite: str, test: Dict[str, Any], report: Report,
                   extra: Dict[str, str]) -> None:
    """Runs one program that meson has built as a test."""
    env = dict(os.environ, **extra)
    env.update(test['env'])
    with open_log(suite, test['name'].replace('/', '-')) as log:
        for outcome in tap.run(test['cmd'], log, UNIT_TIMEOUT,
                               cwd=test['workdir'] or None, env=env):
            outcome.name = f'{test["name"]} {outcome.name}'
            outcome.log = log.name
            report.add(suite, outcome)


def run_logged(suite: str, name: str, report: Report, command: Sequence[str],
               tell: bool = False) -> bool:
    """Runs a command; its failure is reported.

    tell: so is its success, with its last line; it may not be able to run
    Returns whether it has succeeded.
    """
    began = time.monotonic()
    with open_log(suite, name) as log:
        code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL,
                              stdout=log, stderr=subprocess.STDOUT,
                              check=False).returncode
    with open(log.name, encoding='utf-8', errors='replace') as text:
        said = text.read().splitlines() or ['it said nothing']
    status, reason = PASSED, said[-1]
    if tell and code == UNAVAILABLE:
        status = SKIPPED
    elif code:
        sys.stdout.writelines(f'    {line}\n' for line in said[-20:])
        status, reason = FAILED, f'{ending(code)}, see {shown(log.name)}'
    if tell or code:
        report.add(suite, Outcome(name, status, reason,
                                  time.monotonic() - began, log=log.name))
    return code == 0


def unit(report: Report) -> None:
    """The unit tests without QEMU, plain and with sanitizers."""
    meson = shutil.which('meson', path='/usr/bin') or 'meson'
    variants: Tuple[Tuple[str, List[str], Dict[str, str]], ...] = (
        ('plain', [], {}),
        ('sanitize', ['-Db_sanitize=address,undefined'],
         {'ASAN_OPTIONS': 'detect_leaks=1:abort_on_error=1',
          'UBSAN_OPTIONS': 'halt_on_error=1:abort_on_error=1:print_stacktrace=1',
          'G_SLICE': 'always-malloc'}))
    for variant, options, env in variants:
        suite = f'unit {variant}'
        if variant == 'sanitize' and host.overcommit_is_strict():
            report.add(suite, Outcome(
                'all tests', SKIPPED, 'AddressSanitizer maps terabytes, which '
                'vm.overcommit_memory=2 does not allow'))
            continue
        build = os.path.join(ROOT, 'build/unit', variant)
        if not os.path.exists(os.path.join(build, 'build.ninja')):
            shutil.rmtree(build, ignore_errors=True)
            if not run_logged(suite, 'setup', report,
                              [meson, 'setup', build, ROOT, *options]):
                continue
        if not run_logged(suite, 'compile', report, ['ninja', '-C', build]):
            continue
        for test in meson_tests(build):
            run_meson_test(suite, test, report, env)


def stock_failures() -> List[str]:
    """The patterns of tests that must fail on a stock QEMU."""
    with open(STOCK_FAILURES, encoding='utf-8') as file:
        lines = (line.partition('#')[0].strip() for line in file)
        return [line if line.startswith('/x86_64/') else '/x86_64' + line
                for line in lines if line]


def qemu_got_sigbus(log: str) -> bool:
    """Whether the kernel had no memory left for what a QEMU accessed."""
    try:
        with open(log, encoding='utf-8', errors='replace') as file:
            return 'QEMU death from signal 7 (' in file.read()
    except OSError:
        return False


def qtest(report: Report) -> None:
    """This project's migration tests; some must fail on the stock QEMU."""
    accelerator = Accelerator()
    print(f'# accelerator of live guests: {accelerator.description}')
    program = MigrationTest('./qemu-system-x86_64', accelerator, report)
    own = [path for path in program.list() if path.startswith(OWN_TESTS)]
    program.run('qtest', own, 4, lambda outcome: report.add('qtest', outcome))

    biting: List[str] = []
    for pattern in stock_failures():
        matching = [path for path in own if fnmatch.fnmatchcase(path, pattern)]
        if not matching:
            report.add('qtest stock', Outcome(
                pattern, FAILED,
                f'listed in {shown(STOCK_FAILURES)}, but there is no such test'))
        biting += [path for path in matching if path not in biting]

    def must_fail(outcome: Outcome, again: Optional[List[str]]) -> None:
        # A test that hangs or does not start shows nothing.
        proven = (outcome.reported
                  or outcome.reason.startswith(('ERROR:', 'FATAL-ERROR:'))
                  or qemu_got_sigbus(outcome.log))
        if outcome.status == FAILED and not proven and again is not None:
            again.append(outcome.name)
            return
        reason = outcome.reason
        status = {FAILED: PASSED if proven else FAILED,
                  PASSED: FAILED, SKIPPED: SKIPPED}[outcome.status]
        if status == PASSED:
            # Who looks for errors in a long log should not find these.
            reason = 'the stock QEMU does not pass, as it must not'
        elif outcome.status == PASSED:
            reason = 'passes on stock: the test does not show the problem'
        elif not proven:
            reason = f'no failed assertion on stock, but: {reason}'
        report.add('qtest stock', Outcome(outcome.name, status, reason,
                                          outcome.seconds, log=outcome.log))

    # One by one: each of them ends its program.  Of what the end of a QEMU leaves
    # unclear, such as a SIGPIPE for who was talking to it, there are more tries.
    program = MigrationTest(os.path.join(STOCK, 'qemu-system-x86_64'),
                            accelerator, report)
    for last in (False, False, True):
        unclear: List[str] = []
        program.run('qtest stock', biting, len(biting) or 1,
                    functools.partial(must_fail,
                                      again=None if last else unclear))
        biting = unclear


def qemu(report: Report) -> None:
    """QEMU's own migration-test, and our unit tests inside QEMU's tree."""
    accelerator = Accelerator()
    print(f'# accelerator of live guests: {accelerator.description}')
    program = MigrationTest('./qemu-system-x86_64', accelerator, report)
    upstream = [path for path in program.list()
                if not path.startswith(OWN_TESTS)]
    if not any('/postcopy/' in path for path in upstream):
        print('# userfaultfd is not to be had here, so migration-test has no'
              ' postcopy tests')
    program.run('qemu', upstream, len(upstream) or 1,
                lambda outcome: report.add('qemu', outcome))

    ours = {os.path.basename(path)[:-2]
            for path in glob.glob(f'{ROOT}/tests/unit/test-*.c')}
    found = set()
    for test in meson_tests(PATCHED):
        if test['name'] in ours and test['name'] not in found:
            found.add(test['name'])
            run_meson_test('qemu', test, report, {})
    for name in sorted(ours - found):
        report.add('qemu', Outcome(name, FAILED,
                                   "not among the tests of QEMU's tree"))


def fuzz(report: Report) -> None:
    """A short run of what 'make fuzz' does; its log has the seed."""
    run_logged('fuzz', 'fuzz-stream', report,
               rig_command('fuzz-stream', '--seconds', str(FUZZ_TIME)), tell=True)


# What a program is called in a report, and the module that it is
PROGRAMS = {'random-migrations': 'lab.random', 'faults': 'lab.faults',
            'old-and-new': 'lab.oldnew', 'same-stream': 'lab.oldnew.streams',
            'real-guest': 'lab.guest', 'fuzz-stream': 'lab.fuzz'}


def rig_command(program: str, *options: str) -> List[str]:
    """One of the programs of PROGRAMS."""
    return [sys.executable, '-m', PROGRAMS[program], *options]


def run_rig(suite: str, program: str, report: Report, *options: str) -> None:
    """Runs one of them; it speaks TAP."""
    with open_log(suite, program) as log:
        for outcome in tap.run(rig_command(program, *options), log,
                               RIG_TIMEOUT, cwd=ROOT,
                               progress=report.progress):
            outcome.name = f'{program} {outcome.name}'
            outcome.log = log.name
            report.add(suite, outcome)


def random_must_fail(report: Report, sabotage: str,
                     *complaints: str) -> None:
    """Runs cases with a promise broken: who notices, and as what?"""
    began = time.monotonic()
    name = f'broken on purpose, {sabotage}'
    with open_log('random', sabotage) as log:
        outcomes = tap.run(
            rig_command('random-migrations', '--tap', *BROKEN_CASES, '--jobs',
                        str(job_count()), '--sabotage', sabotage),
            log, RIG_TIMEOUT, cwd=ROOT)
        path = log.name
    with open(path, encoding='utf-8', errors='replace') as log:
        said = log.read()
    unsaid = [text for text in complaints if text not in said]
    failed = sum(outcome.status == FAILED and outcome.reported
                 for outcome in outcomes)
    reason = (f'no case complains: {unsaid[0]}' if unsaid else
              f'{failed} of {len(outcomes)} cases fail, as they must')
    report.add('random', Outcome(name, FAILED if unsaid else PASSED, reason,
                                 time.monotonic() - began, log=path))


def random(report: Report) -> None:
    """A fixed set of random migrations, and that they notice what is wrong."""
    run_rig('random', 'random-migrations', report, '--tap', '--jobs',
            str(job_count()), *RANDOM_CASES)
    random_must_fail(report, 'stock-destination',
                     'do not have the content that they have to have')
    random_must_fail(report, 'holes-off', 'are populated for nothing')


def random_long(report: Report) -> None:
    """A thousand of them, others each time; the log has the seeds."""
    run_rig('random-long', 'random-migrations', report, '--tap', '--jobs',
            str(job_count()), '--cases', '1000')


def guests_long(report: Report) -> None:
    """A guest that writes all the time, in all modes; half an hour and more."""
    program = MigrationTest('./qemu-system-x86_64', None, report,
                            ['--full'])
    tests = [path for path in program.list()
             if path.startswith(LONG_GUEST_TESTS)]
    for name, reason in (('tcg', 'this QEMU has no TCG'),
                         ('kvm', 'there is no usable /dev/kvm'),
                         ('kvm-ring', 'this KVM has no dirty rings')):
        if not any(path.startswith(f'{LONG_GUEST_TESTS}{name}/')
                   for path in tests):
            report.add('guests-long', Outcome(f'{LONG_GUEST_TESTS}{name}',
                                              SKIPPED, reason))
    program.run('guests-long', tests, len(tests) or 1,
                lambda outcome: report.add('guests-long', outcome))


def real_guest(report: Report) -> None:
    """Linux with a load, migrated back and forth; some minutes."""
    run_logged('real-guest', 'real-guest', report, rig_command('real-guest'),
               tell=True)


def faults(report: Report) -> None:
    """Migrations that fail in ways that are always the same."""
    run_rig('faults', 'faults', report, '--tap', '--fixed', '--jobs',
            str(job_count()))


def faults_long(report: Report) -> None:
    """Migrations that fail in drawn ways; the log has the seeds."""
    for arguments in (['--cases', str(RANDOM_FAULTS)], ['--live', str(LIVE_FAULTS)]):
        run_rig('faults-long', 'faults', report, '--tap', '--jobs',
                str(job_count()), *arguments)


def old_new(report: Report) -> None:
    """A few migrations between stock and patched QEMU; and their streams."""
    for program in 'old-and-new', 'same-stream':
        run_rig('old-new', program, report, '--quick')


def old_new_long(report: Report) -> None:
    """All of them, also with QEMU 7.2."""
    suite = 'old-new-long'
    result = subprocess.run([f'{ROOT}/scripts/get-old-qemu'], check=False,
                            stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = result.stdout.strip().rpartition('\n')[2]
    options = []
    if result.returncode == UNAVAILABLE:
        options = ['--no-old', said]
    elif result.returncode:
        report.add(suite, Outcome('get-old-qemu', FAILED,
                                  said or ending(result.returncode)))
        return
    run_rig(suite, 'old-and-new', report, *options)
    run_rig(suite, 'same-stream', report)


# Tests that a sanitizer has an effect on
NOT_SANITIZED = {
    '*/pressure/*': 'a sanitizer takes more memory than it leaves',
    '*/cpr/*': 'a sanitizer changes how much memory QEMU takes',
    '*/memfd/idle*': 'a sanitizer changes how much memory QEMU takes',
    '*/ram/idle*': 'a sanitizer changes how much memory QEMU takes',
    '*/mem-lock/*': 'with a sanitizer, mlockall() does nothing'}

# Of the two sanitizers: the tests that are run, and what they are told
SANITIZERS: Dict[str, Tuple[Tuple[str, ...], Dict[str, str]]] = {
    'asan': (('*',), {
        # Through GLib, whose functions have no frame pointers, to the caller
        'ASAN_OPTIONS': 'detect_leaks=1:exitcode=0:log_path={}/asan:'
                        'fast_unwind_on_malloc=0',
        'UBSAN_OPTIONS': 'print_stacktrace=1:log_path={}/ubsan',
        'G_SLICE': 'always-malloc'}),
    # A second lock of a recursive mutex is no deadlock
    'tsan': (('*multifd*', '*postcopy*'), {
        'TSAN_OPTIONS': 'detect_deadlocks=0:history_size=7:exitcode=0:'
                        'log_path={}/tsan'})}


def sanitized_tests(suite: str, program: MigrationTest,
                    report: Report) -> List[str]:
    """Which tests to run with a sanitizer."""
    wanted = []
    for path in program.list():
        if not path.startswith(OWN_TESTS) or not any(
                fnmatch.fnmatchcase(path, pattern)
                for pattern in SANITIZERS[suite][0]):
            continue
        why = next((reason for pattern, reason in NOT_SANITIZED.items()
                    if fnmatch.fnmatchcase(path, pattern)), '')
        if why:
            report.add(suite, Outcome(path, SKIPPED, why))
        else:
            wanted.append(path)
    return wanted


def sanitized_reports(suite: str, tree: str, report: Report,
                      add: Callable[[Outcome], None]
                      ) -> Optional[List[sanitizers.Report]]:
    """Run our migration tests with a QEMU that is built with a sanitizer.

    @tree: 'stock' or 'patched'
    @add: is called for each test

    Returns what the sanitizer has reported; None if there is no such QEMU.
    """
    build = f'{tree}-{suite}'
    if subprocess.run([f'{ROOT}/scripts/build-qemu', build], check=False,
                      stdin=subprocess.DEVNULL).returncode:
        report.add(suite, Outcome('build', FAILED, 'see above'))
        return None
    logs = os.path.join(LOGS, suite, f'reports-{tree}')
    shutil.rmtree(logs, ignore_errors=True)
    os.makedirs(logs)
    program = MigrationTest(
        os.path.join(BUILD, build, 'qemu-system-x86_64'), Accelerator(), report,
        extra={name: value.format(logs) for name, value
               in SANITIZERS[suite][1].items()})
    program.run(suite, sanitized_tests(suite, program, report), 8, add)
    return sanitizers.read_directory(logs)


def run_sanitized(suite: str, report: Report) -> None:
    """Our migration tests, with a patched QEMU that has a sanitizer."""
    reports = sanitized_reports(suite, 'patched', report,
                                lambda outcome: report.add(suite, outcome))
    if reports is None:
        return
    known = sanitizers.Listed(f'{ROOT}/lab/ci/{suite}.supp')
    verdict = sanitizers.judge(
        reports, sanitizers.Ownership(f'{BUILD}/stock-src', PATCHED_SOURCE),
        known)
    for found, whose in ((verdict.ours, 'ours'),
                         (verdict.unlisted,
                          f'not in lab/ci/{suite}.supp')):
        for where, example in found.items():
            print(''.join(f'    {line}\n' for line in example.text))
            report.add(suite, Outcome(where, FAILED, f'{whose}, see above'))
    for where, count in sorted(verdict.listed.items()):
        print(f'# listed, {count} times: {where}')
    for entry in known.entries:
        if entry not in known.used:
            print(f'# listed, but not reported this time: {entry}')
    if not verdict.ours and not verdict.unlisted:
        report.add(suite, Outcome('reports', PASSED,
                                  f'{sum(verdict.listed.values())} of what '
                                  'QEMU without the patches reports, too'))


def list_reports(suite: str, report: Report) -> None:
    """What the stock QEMU reports, for the lists; its tests may fail."""
    reports = sanitized_reports(suite, 'stock', report, lambda outcome: None)
    if reports is None:
        return
    counts = collections.Counter(each.where for each in reports)
    for where, count in sorted(counts.items()):
        print(f'{where}   # {count} times')
    report.add(suite, Outcome('list', PASSED if reports else FAILED,
                              f'{len(reports)} reports, {len(counts)} kinds'))


def scripts(report: Report) -> None:
    """The tests of this project's Python code."""
    for path in sorted(glob.glob(f'{ROOT}/lab/tests/test_*.py')):
        name = os.path.basename(path)[:-3]
        with open_log('scripts', name) as log:
            for outcome in tap.run(
                    [sys.executable, '-m', 'lab.ci.unittests',
                     f'lab.tests.{name}'],
                    log, UNIT_TIMEOUT, cwd=ROOT):
                outcome.log = log.name
                report.add('scripts', outcome)


def files_below(*directories: str) -> List[str]:
    """This project's files there, without what editors and tools leave."""
    found = []
    for top in directories:
        for directory, subdirectories, names in os.walk(os.path.join(ROOT, top)):
            subdirectories[:] = [name for name in subdirectories
                                 if name[0] != '.' and name != '__pycache__']
            found += [os.path.join(directory, name) for name in names
                      if name[0] != '.'
                      and not name.endswith(('~', '.orig', '.rej'))]
    return sorted(found)


def first_line(path: str) -> str:
    """For telling shell from Python."""
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.readline()


# What "make lint" runs, too
LINT = (('mypy', '--config-file', 'lab/setup.cfg', 'lab'),
        ('flake8', '--config', 'lab/setup.cfg', 'lab', 'scripts/dep3'))


def style(report: Report) -> None:
    """checkpatch.pl, shellcheck, mypy, flake8, and rules of this project."""
    def check(name: str, problem: str) -> None:
        report.add('style', Outcome(name, FAILED if problem else PASSED, problem))

    def check_command(name: str, command: Sequence[str]) -> None:
        result = subprocess.run(command, cwd=ROOT, text=True, check=False,
                                stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if result.returncode:
            print(''.join(f'    {line}\n' for line in result.stdout.splitlines()[:60]))
        check(name, 'see above' if result.returncode else '')

    def check_if_installed(name: str, command: Sequence[str]) -> None:
        if shutil.which(command[0]):
            check_command(name, command)
        else:
            report.add('style', Outcome(name, SKIPPED,
                                        f'{command[0]} is not installed'))

    code = files_below('include', 'util', 'migration', 'tests', 'docs', 'lab')
    tools = files_below('scripts', '.ci')
    # Those of the base, and those that it shares with the others
    patches = sorted(glob.glob(f'{ROOT}/patches/*.patch') +
                     glob.glob(f'{PATCHES}/*.patch'))
    series = os.path.join(ROOT, 'patches/series')

    check('SPDX-License-Identifier', ', '.join(
        shown(path) for path in [*code, *tools, series]
        if b'SPDX-License-Identifier: GPL-2.0-or-later'
        not in open(path, 'rb').read(2000)))
    # MAINTAINERS is told of new files where the series goes upstream.
    checkpatch = ['perl', f'{PATCHED_SOURCE}/scripts/checkpatch.pl',
                  '--no-tree', '--no-signoff', '--quiet']
    for path in map(shown, code):
        # What stands in for QEMU's headers cannot use them, as it asks for.
        # To checkpatch, what is not below tests/ is no test, and must not assert.
        if path.endswith(('.c', '.h')) and \
                not path.startswith(('tests/standalone/', 'lab/qtest/')):
            check_command(f'checkpatch {path}', [*checkpatch, '-f', path])
    for path in map(shown, patches):
        # One that only completes files of ours has no hunks.
        with open(os.path.join(ROOT, path), encoding='utf-8') as patch:
            if '\n+++ ' in patch.read():
                check_command(f'checkpatch {path}', [*checkpatch, path])

    for path in tools:
        if 'sh' in first_line(path).partition('#!')[2] or path.endswith('.sh'):
            check_if_installed(f'shellcheck {shown(path)}',
                               ['shellcheck', '-x', path])
    check_command('awk', ['scripts/check-awk', 'Makefile',
                          *(shown(path) for path in tools
                            if 'sh' in first_line(path).partition('#!')[2]
                            or path.endswith('.sh'))])
    for command in LINT:
        check_if_installed(' '.join(command), list(command))


SUITES = {'unit': unit, 'qtest': qtest, 'qemu': qemu, 'fuzz': fuzz,
          'random': random, 'faults': faults, 'old-new': old_new,
          'scripts': scripts, 'style': style}

LONG_SUITES = {'random-long': random_long, 'faults-long': faults_long,
               'old-new-long': old_new_long, 'guests-long': guests_long,
               'real-guest': real_guest,
               # Under AddressSanitizer and UBSan, and under ThreadSanitizer
               **{suite: functools.partial(run_sanitized, suite)
                  for suite in SANITIZERS}}

# For whoever writes a list
LISTS = {f'{suite}-list': functools.partial(list_reports, suite)
         for suite in SANITIZERS}

SETS = {'all': SUITES, 'long': LONG_SUITES}


def main() -> int:
    """Runs what is named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = {**SUITES, **LONG_SUITES, **LISTS}
    parser.add_argument('suite', nargs='+', choices=[*suites, *SETS])
    names = [suite for name in parser.parse_args().suite
             for suite in SETS.get(name, [name])]
    # Many tests crash on purpose, some with all of a guest's RAM.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    report = Report()
    for name in names:
        before = len(report.outcomes)
        print(f'== {name}', flush=True)
        try:
            suites[name](report)
        except Exception as error:
            # Whatever it is, what has been run is still to be summed up.
            traceback.print_exc(file=sys.stdout)
            report.add(name, Outcome('suite', FAILED, repr(error)))
        if not any(outcome.status != SKIPPED
                   for _, outcome in report.outcomes[before:]):
            report.add(name, Outcome('suite', FAILED, 'no test was run'))
    return report.close()


if __name__ == '__main__':
    sys.exit(main())
