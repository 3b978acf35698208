# SPDX-License-Identifier: GPL-2.0-or-later
"""The suites that run our migration tests with QEMUs that have a sanitizer."""

import collections
import fnmatch
import os
import shutil
import subprocess
from typing import Callable, Dict, List, Optional, Tuple

from lab.base import BUILD, ROOT
from lab.ci import sanitizers
from lab.ci.migration_tests import OWN_TESTS, Accelerator, MigrationTest
from lab.ci.report import LOGS, Report
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome

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


def sanitized_tests(suite: str, program: MigrationTest, report: Report) -> List[str]:
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
        reports, sanitizers.Ownership(f'{BUILD}/stock-src', f'{BUILD}/patched-src'),
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
