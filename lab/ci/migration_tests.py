# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's programs of migration tests, run side by side."""

import os
import subprocess
import sys
import tempfile
from typing import Callable, Dict, List, Optional, Sequence

from lab import jobs
from lab.base import BUILD
from lab.ci import tap
from lab.ci.report import Report, open_log
from lab.outcome import FAILED, Outcome, ending
from lab.qemu import pick_accelerator

PATCHED = os.path.join(BUILD, 'patched')
OWN_TESTS = '/x86_64/migration/sparse/'

# What a test may need at once: two guests that are filled.
MEMORY_PER_JOB = 4 << 30

# QEMU's own program, with those of our tests that are mailed, and ours
TEST_PROGRAMS = ('./tests/qtest/migration-test', './tests/qtest/sparse-lab-test')


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


def job_count() -> int:
    """How many test programs to run side by side."""
    return int(os.environ.get('JOBS') or jobs.fitting(MEMORY_PER_JOB))


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
                                   log, expected=paths,
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
