# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/ci/tap.py: nothing but a reported success may pass."""

import io
import unittest

from lab.ci import tap
from lab.outcome import FAILED, PASSED, SKIPPED


def run(script: str, expected=(), timeout: float = 20):
    """What a shell script's TAP comes to: (name, status) pairs, reasons."""
    outcomes = tap.run(['sh', '-c', script], io.StringIO(), timeout, expected)
    return ([(outcome.name, outcome.status) for outcome in outcomes],
            [outcome.reason for outcome in outcomes])


class Tap(unittest.TestCase):
    """One program each."""

    def test_results(self):
        self.assertEqual(
            run('echo 1..3; echo ok 1 /a; echo "not ok 2 /b - why";'
                'echo "ok 3 /c # SKIP no huge pages"; exit 1'),
            ([('/a', PASSED), ('/b', FAILED), ('/c', SKIPPED)],
             ['', 'why', 'no huge pages']))

    def test_crash(self):
        names, reasons = run('echo ok 1 /a; kill -SEGV $$', ['/a', '/b', '/c'])
        self.assertEqual(names, [('/a', PASSED), ('/b', FAILED)])
        self.assertIn('SIGSEGV', reasons[1])

    def test_crash_after_the_last_result(self):
        names, _ = run('echo 1..1; echo ok 1 /a; kill -SEGV $$', ['/a'])
        self.assertIn(FAILED, [status for _, status in names])

    def test_bail_out_gives_the_reason(self):
        _, reasons = run('echo "Bail out! ERROR:x.c:1: assertion failed";'
                         'kill -ABRT $$', ['/a'])
        self.assertEqual(reasons, ['ERROR:x.c:1: assertion failed'])

    def test_behind_what_a_qemu_says(self):
        """It has begun to, and goes on in the next line."""
        self.assertEqual(
            run('echo "qemu-system-x86_64:ok 1 /a"; echo " it was that";'
                'echo "qemu-system-x86_64: so it isnot ok 2 /b - why";'
                'echo qemu-system-x86_64:1..2; exit 1'),
            ([('/a', PASSED), ('/b', FAILED)], ['', 'why']))
        _, reasons = run('echo "qemu-system-x86_64:Bail out! ERROR:x.c:1";'
                         'echo " and more"; kill -ABRT $$', ['/a'])
        self.assertEqual(reasons, ['ERROR:x.c:1'])

    def test_hang(self):
        names, reasons = run('echo ok 1 /a; sleep 60', ['/a', '/b'], 5)
        self.assertEqual(names, [('/a', PASSED), ('/b', FAILED)])
        self.assertIn('no sign of life', reasons[1])

    def test_silence_is_failure(self):
        self.assertEqual(run('true')[0], [('sh', FAILED)])
        self.assertEqual(run('true', ['/a'])[0], [('/a', FAILED)])

    def test_fewer_than_planned_is_failure(self):
        names, _ = run('echo 1..2; echo ok 1 /a')
        self.assertEqual(names[1][1], FAILED)

    def test_exit_status_counts(self):
        names, _ = run('echo 1..1; echo ok 1 /a; exit 3')
        self.assertIn(FAILED, [status for _, status in names])

    def test_a_failure_is_not_undone(self):
        names, _ = run('echo not ok 1 /a; echo ok 2 /a')
        self.assertEqual(names, [('/a', FAILED)])

    def test_skip_of_all(self):
        self.assertEqual(run('echo "1..0 # SKIP no kernel support"'),
                         ([('sh', SKIPPED)], ['no kernel support']))
