# SPDX-License-Identifier: GPL-2.0-or-later
"""Run test suites and print what they did.

The suites: unit (the unit tests without QEMU, plain and with sanitizers),
qtest (this project's migration tests, on the patched and on the stock QEMU),
qemu (QEMU's own migration-test on the patched QEMU), fuzz (damaged streams for
the patched QEMU, for half a minute), random (a few random migrations), faults
(migrations that fail, a fixed set), old-new (a few migrations between the patched
and the stock QEMU, and their streams), stack (a few migrations with libvirt and
virtiofsd in a Debian, where one can be made), scripts (this project's Python code),
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
import fnmatch
import functools
import glob
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import traceback
from typing import Any, Dict, List, Optional, Sequence, Tuple

from lab import host
from lab.base import BUILD, ROOT
from lab.ci import tap
from lab.ci.migration_tests import (OWN_TESTS, PATCHED, Accelerator,
                                    MigrationTest, job_count)
from lab.ci.report import Report, open_log, shown
from lab.ci.sanitized import SANITIZERS, list_reports, run_sanitized
from lab.ci.style import style
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, ending

STOCK = os.path.join(BUILD, 'stock')
STOCK_FAILURES = os.path.join(ROOT, 'tests/stock-failures.txt')

LONG_GUEST_TESTS = OWN_TESTS + 'stress/long/'

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


def meson_tests(build: str) -> List[Dict[str, Any]]:
    """What meson knows of a build directory's tests."""
    with open(os.path.join(build, 'meson-info/intro-tests.json'),
              encoding='utf-8') as file:
        return json.load(file)


def run_tap(suite: str, name: str, report: Report, command: Sequence[str],
            **options: Any) -> None:
    """Runs a program that speaks TAP; options: of tap.run()."""
    with open_log(suite, name.replace('/', '-')) as log:
        for outcome in tap.run(command, log, **options):
            outcome.name = f'{name} {outcome.name}'
            outcome.log = log.name
            report.add(suite, outcome)


def run_meson_test(suite: str, test: Dict[str, Any], report: Report,
                   extra: Dict[str, str]) -> None:
    """Runs one program that meson has built as a test."""
    run_tap(suite, test['name'], report, test['cmd'], cwd=test['workdir'] or None,
            env={**os.environ, **extra, **test['env']})


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
    upstream = [path for path in program.list() if not path.startswith(OWN_TESTS)]
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
        report.add('qemu', Outcome(name, FAILED, "not among the tests of QEMU's tree"))


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
    run_tap(suite, program, report, rig_command(program, *options),
            timeout=RIG_TIMEOUT, cwd=ROOT, progress=report.progress)


def random_must_fail(report: Report, sabotage: str, *complaints: str) -> None:
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
    failed = sum(outcome.status == FAILED and outcome.reported for outcome in outcomes)
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
    program = MigrationTest('./qemu-system-x86_64', None, report, ['--full'])
    tests = [path for path in program.list() if path.startswith(LONG_GUEST_TESTS)]
    for name, reason in (('tcg', 'this QEMU has no TCG'),
                         ('kvm', 'there is no usable /dev/kvm'),
                         ('kvm-ring', 'this KVM has no dirty rings')):
        if not any(path.startswith(f'{LONG_GUEST_TESTS}{name}/') for path in tests):
            report.add('guests-long', Outcome(f'{LONG_GUEST_TESTS}{name}',
                                              SKIPPED, reason))
    program.run('guests-long', tests, len(tests) or 1,
                lambda outcome: report.add('guests-long', outcome))


def real_guest(report: Report) -> None:
    """Linux with a load, migrated back and forth; some minutes."""
    run_logged('real-guest', 'real-guest', report, rig_command('real-guest'), tell=True)


def faults(report: Report) -> None:
    """Migrations that fail in ways that are always the same."""
    run_rig('faults', 'faults', report, '--tap', '--fixed', '--jobs', str(job_count()))


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


def stack(report: Report) -> None:
    """A few migrations with libvirt, virtiofsd and more, where a Debian can be made.
    """
    run_logged('stack', 'check-stack', report, ['scripts/check-stack', '--quick'],
               tell=True)


def scripts(report: Report) -> None:
    """The tests of this project's Python code."""
    for path in sorted(glob.glob(f'{ROOT}/lab/tests/test_*.py')):
        name = os.path.basename(path)[:-3]
        run_tap('scripts', name, report, [sys.executable, '-m', 'lab.ci.unittests',
                                          f'lab.tests.{name}'], cwd=ROOT)


SUITES = {'unit': unit, 'qtest': qtest, 'qemu': qemu, 'fuzz': fuzz,
          'random': random, 'faults': faults, 'old-new': old_new,
          'stack': stack, 'scripts': scripts, 'style': style}

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
