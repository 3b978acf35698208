# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that each step of the series builds and passes its tests.

series-tree has made a commit of each patch, on a complete tree.  For each of them,
QEMU and the tests are built, without a warning; the unit tests of the
series that exist are run, and a few of QEMU's own migration tests, and tests in
which a guest keeps writing while it is migrated (these are taken from the end of
the series, but pass with any QEMU); and the series' own migration tests as soon
as they are there.

A step that has passed is not done again while its tree stays the same.  A step
with the same binaries as the one before does not repeat the migration tests.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import Dict, Iterator, List, Set, Tuple

from lab.base import BUILD as BASE_BUILD, ROOT
from lab.ci import tap
from lab.ci.migration_tests import OWN_TESTS, Accelerator, MigrationTest
from lab.ci.report import shown
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, Wrong


TREE = os.path.join(BASE_BUILD, 'series-tree')
SOURCE = os.path.join(TREE, 'src')
BUILD = os.path.join(TREE, 'build')
RESULTS = os.path.join(TREE, 'results.json')
LOGS = os.path.join(BASE_BUILD, 'logs/series')
REPOSITORY = os.path.join(ROOT, 'build/git')

# Of QEMU's own tests: each way that RAM takes, once
QEMU_TESTS = (
    '/x86_64/migration/precopy/tcp/plain',
    '/x86_64/migration/multifd/tcp/uri/plain/none',
    '/x86_64/migration/multifd/file/mapped-ram/dio',
    '/x86_64/migration/postcopy/plain',
    '/x86_64/migration/postcopy/recovery/plain',
    '/x86_64/migration/analyze-script',
)

# A guest with a memfd that reads and writes holes and zero pages all the time
WRITER_TESTS = (
    '/x86_64/migration/sparse/stress/short/tcg/precopy/shift-18',
    '/x86_64/migration/sparse/stress/short/tcg/multifd/shift-6',
    '/x86_64/migration/sparse/stress/postcopy/plain',
    '/x86_64/migration/sparse/stress/postcopy/recover',
)

# The last thing that they look at: no page was lost, but with postcopy all of
# them are allocated, as they are with stock QEMU
FILLED = 'untouched_allocated == 0'

WARNING = re.compile(r': warning: |^warning: ', re.MULTILINE)


def git(*args: str) -> str:
    """Runs git on the repository of the steps."""
    return subprocess.run(
        ['git', f'--git-dir={REPOSITORY}', f'--work-tree={SOURCE}', *args],
        check=True, text=True, stdout=subprocess.PIPE, cwd=SOURCE,
        env=dict(os.environ, GIT_INDEX_FILE=f'{TREE}/index')).stdout.strip()


def steps() -> List[str]:
    """The commits: the base, and one for each patch."""
    with open(os.path.join(TREE, 'steps'), encoding='utf-8') as file:
        return file.read().split()


def topic_of(step: int) -> str:
    """What the patch of a step is mailed with."""
    match = re.search(r'^Topic: (.*)$',
                      git('log', '-1', '--format=%B', steps()[step]), re.MULTILINE)
    return match[1] if match else ''


def parse_steps(text: str, last: int) -> List[int]:
    """The steps that "5", "5-9", "5-" or several of these with commas mean."""
    numbers: Set[int] = set()
    for part in text.split(','):
        match = re.fullmatch(r'(\d+)(-(\d*))?', part.strip())
        if not match:
            sys.exit(f'check-series: STEPS={text}: {part!r} is not a number or a'
                     ' range such as 5-9')
        first = int(match[1])
        end = first if match[2] is None else int(match[3] or last)
        if not 1 <= first <= end <= last:
            sys.exit(f'check-series: STEPS={text}: the steps are 1 to {last}')
        numbers.update(range(first, end + 1))
    return sorted(numbers)


def hash_of(*paths: str) -> str:
    """One hash for the contents of several files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def own_unit_tests() -> List[str]:
    """Those of the series that exist at the step."""
    directory = os.path.join(ROOT, 'tests/unit')
    return sorted(name[:-2] for name in os.listdir(directory)
                  if re.fullmatch(r'test-.*\.c', name)
                  and os.path.exists(os.path.join(SOURCE, 'tests/unit', name)))


def build(step: int) -> str:
    """Builds what is checked out; returns how long it took."""
    began = time.monotonic()
    path = os.path.join(LOGS, f'build-{step}.log')
    command = ['ninja', '-C', BUILD]
    if os.environ.get('JOBS'):
        command += ['-j', os.environ['JOBS']]
    command += ['qemu-system-x86_64', 'tests/qtest/migration-test',
                *(f'tests/unit/{name}' for name in own_unit_tests())]
    env = dict(os.environ)
    if shutil.which('ccache'):
        env.update(CCACHE_BASEDIR=TREE, CCACHE_NOHASHDIR='1')
    with open(path, 'w', encoding='utf-8') as log:
        code = subprocess.run(command, check=False, stdout=log, env=env,
                              stdin=subprocess.DEVNULL,
                              stderr=subprocess.STDOUT).returncode
    with open(path, encoding='utf-8', errors='replace') as log:
        text = log.read()
    if code:
        raise Wrong(f'does not build, see {shown(path)}')
    if WARNING.search(text):
        raise Wrong(f'builds with warnings, see {shown(path)}')
    return f'{time.monotonic() - began:.0f} s'


def run_unit_tests(step: int) -> List[Outcome]:
    """The unit tests of the series that exist."""
    outcomes = []
    for name in own_unit_tests():
        path = os.path.join(LOGS, f'{step}-{name}.log')
        with open(path, 'w', encoding='utf-8') as log:
            for outcome in tap.run([f'{BUILD}/tests/unit/{name}', '--tap', '-k'],
                                   log, cwd=BUILD):
                outcome.name, outcome.log = f'{name} {outcome.name}', path
                outcomes.append(outcome)
    return outcomes


def run_migration_tests(program: MigrationTest, step: int,
                        paths: List[str]) -> List[Outcome]:
    """Migration tests, side by side."""
    outcomes: List[Outcome] = []
    # Live guests one by one, the many short ones in larger pieces
    chunks = 4 if len(paths) > 20 else len(paths)
    if paths:
        program.run(f'series-{step}', paths, chunks, outcomes.append)
    return outcomes


class Step:
    """One step of the series."""

    def __init__(self, number: int, accelerator: Accelerator, quick: bool) -> None:
        self.number = number
        self.accelerator = accelerator
        self.quick = quick
        self.commit = steps()[number]
        self.tree = git('rev-parse', f'{self.commit}^{{tree}}')
        self.subject = git('log', '-1', '--format=%s', self.commit)
        self.binaries = ''
        self.failed: List[Outcome] = []

    def _count(self, outcomes: List[Outcome]) -> str:
        self.failed += [outcome for outcome in outcomes if outcome.status == FAILED]
        if not outcomes:
            return '-'
        words = ((PASSED, 'ok'), (FAILED, 'FAILED'), (SKIPPED, 'skipped'),
                 (FILLED, 'filled'))
        numbers = ((sum(outcome.status == status for outcome in outcomes), word)
                   for status, word in words)
        return ', '.join(f'{number} {word}' for number, word in numbers if number)

    def check_out(self) -> None:
        """Puts the files of the step in place."""
        git('-c', 'core.bare=false', 'read-tree', '--reset', '-u', self.commit)

    def run(self, previous: Dict[str, str]) -> Iterator[str]:
        """Does the work, and yields the columns of the table, one by one."""
        self.check_out()
        yield build(self.number)
        yield self._count(run_unit_tests(self.number))
        if self.quick:
            return
        self.binaries = hash_of(f'{BUILD}/qemu-system-x86_64',
                                f'{BUILD}/tests/qtest/migration-test',
                                f'{SOURCE}/scripts/analyze-migration.py')
        same = previous.get(self.binaries)
        if same:
            yield from [f'as step {same}'] * 3
            return
        program = MigrationTest('./qemu-system-x86_64', self.accelerator, build=BUILD)
        there = program.list()
        wanted = [path for path in QEMU_TESTS if path in there]
        if len(wanted) < len(QEMU_TESTS):
            print(f'    not among the tests here: '
                  f'{" ".join(sorted(set(QEMU_TESTS) - set(wanted)))}')
        yield self._count(run_migration_tests(program, self.number, wanted))
        writer = MigrationTest(f'{BUILD}/qemu-system-x86_64', self.accelerator)
        outcomes = run_migration_tests(writer, self.number, list(WRITER_TESTS))
        own = [path for path in there if path.startswith(OWN_TESTS)]
        for outcome in outcomes:
            if outcome.status == FAILED and FILLED in outcome.reason and not own:
                outcome.status = FILLED
        yield self._count(outcomes)
        yield self._count(run_migration_tests(program, self.number, own))


COLUMNS = (('build', 7), ('unit', 17), ("QEMU's", 9), ('writer', 15),
           ('own qtests', 17))


def load_results() -> Dict[str, List[str]]:
    """The columns of the steps that have passed, by tree; and the key."""
    try:
        with open(RESULTS, encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def save_results(results: Dict[str, List[str]]) -> None:
    """So that what was done need not be done again."""
    with open(RESULTS + '.tmp', 'w', encoding='utf-8') as file:
        json.dump(results, file, indent=1)
    os.replace(RESULTS + '.tmp', RESULTS)


def check_step(step: Step, results: Dict[str, List[str]],
               previous: Dict[str, str]) -> bool:
    """One line of the table; whether all is well."""
    key = f'{step.tree} {len(QEMU_TESTS)} {len(WRITER_TESTS)}'
    done = results.get(key)
    if step.quick:
        key += ' quick'
        done = done or results.get(key)
    print(f'{step.number:4}  {step.subject[:67]:67}', end='', flush=True)
    if done:
        *before, binaries = done
        for (_, width), text in zip(COLUMNS, before):
            print(f'  {text:{width}}', end='')
        print('  done before')
        previous.setdefault(binaries, str(step.number))
        return True
    columns: List[str] = []
    problem = ''
    try:
        for (_, width), text in zip(COLUMNS, step.run(previous)):
            columns.append(text)
            print(f'  {text:{width}}', end='', flush=True)
    except Wrong as failure:
        problem = str(failure)
    print(flush=True)
    if problem:
        print(f'      FAILED: {problem}', flush=True)
    for outcome in step.failed:
        print(f'      FAILED: {outcome.name}: {outcome.reason} '
              f'(see {shown(outcome.log)})', flush=True)
    if problem or step.failed:
        return False
    if not step.quick:
        previous.setdefault(step.binaries, str(step.number))
    results[key] = [*columns, step.binaries]
    save_results(results)
    return True


def main() -> int:
    """Checks the steps that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('steps', nargs='?', default='1-',
                        help='such as 5, 5-9, 5- or 1,5-9; default: all')
    parser.add_argument('--quick', action='store_true',
                        help='build and unit tests only')
    parser.add_argument('--topic', help='only the steps of a topic')
    args = parser.parse_args()
    last = len(steps()) - 1
    numbers = parse_steps(args.steps, last)
    if args.topic:
        numbers = [number for number in numbers if topic_of(number) == args.topic]
        if not numbers:
            sys.exit(f'check-series: no step has the topic {args.topic}; '
                     'patches/topics lists them')
    os.makedirs(LOGS, exist_ok=True)

    accelerator = Accelerator()
    print(f'# accelerator of live guests: {accelerator.description}')
    print('step  ' + f'{"subject":67}' + ''.join(
        f'  {title:{width}}' for title, width in COLUMNS))
    results = load_results()
    previous: Dict[str, str] = {}
    bad: List[Tuple[int, str]] = []
    for number in numbers:
        step = Step(number, accelerator, args.quick)
        if not check_step(step, results, previous):
            bad.append((number, step.subject))
    print(f'\n{len(numbers) - len(bad)} of {len(numbers)} steps are all right')
    for number, subject in bad:
        print(f'  not step {number}: {subject}')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
