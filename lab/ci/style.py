# SPDX-License-Identifier: GPL-2.0-or-later
"""The suite that looks at style."""

import glob
import os
import shutil
import subprocess
from typing import List, Sequence

from lab.base import BUILD, PATCHES, ROOT
from lab.ci.report import Report, shown
from lab.outcome import FAILED, PASSED, SKIPPED, Outcome

PATCHED_SOURCE = os.path.join(BUILD, 'patched-src')


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
            check_if_installed(f'shellcheck {shown(path)}', ['shellcheck', '-x', path])
    check_command('awk', ['scripts/check-awk', 'Makefile',
                          *(shown(path) for path in tools
                            if 'sh' in first_line(path).partition('#!')[2]
                            or path.endswith('.sh'))])
    for command in LINT:
        check_if_installed(' '.join(command), list(command))
