# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of the series to commits and back: make edit, make save, make port.

On a QEMU of a few lines, of which there are two bases.
"""

import os
import shutil
import subprocess
import tempfile
import unittest
from typing import Dict, List

from lab.base import ROOT
from lab.tests import MAIL, NAME, WHO, read

GIT = {**WHO, 'GIT_CONFIG_GLOBAL': '/dev/null', 'GIT_CONFIG_NOSYSTEM': '1',
       'GIT_EDITOR': 'true', 'GIT_SEQUENCE_EDITOR': 'true'}

SCRIPTS = ('lib.sh', 'series.sh', 'apply-series', 'edit-series', 'save-series',
           'port-series', 'make-reference', 'format-series', 'clean')

# What both bases have: 9.0 lacks two lines in front, and calls something otherwise
RAM = [f'int line_{number};\n' for number in range(40)]


def write(path: str, text: str) -> None:
    """A file, with the directories that it needs."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(text)


@unittest.skipUnless(shutil.which('git') and shutil.which('rsync'),
                     'git or rsync is not installed')
class Project(unittest.TestCase):
    """A project of three patches, two files of ours, and two bases."""

    template = ''

    def setUp(self) -> None:
        directory = self.enterContext(tempfile.TemporaryDirectory(prefix='sparse-ram-'))
        self.top = os.path.join(directory, 'project')
        self.edit = f'{self.top}/build/9.2/edit'
        if Project.template:
            shutil.copytree(Project.template, self.top)
            return
        self.make_project()
        template = tempfile.TemporaryDirectory(prefix='sparse-ram-')
        unittest.addModuleCleanup(template.cleanup)
        Project.template = os.path.join(template.name, 'project')
        shutil.copytree(self.top, Project.template)

    def make_project(self) -> None:
        """Once: from what was written by hand, or by another tool."""
        for name in SCRIPTS:
            os.makedirs(f'{self.top}/scripts', exist_ok=True)
            shutil.copy(f'{ROOT}/scripts/{name}', f'{self.top}/scripts/{name}')
        write(f'{self.top}/scripts/get-source', '#!/bin/sh\n')
        os.chmod(f'{self.top}/scripts/get-source', 0o755)
        write(f'{self.top}/.gitignore', '/build/\n')
        for name, text in (('default', '9.0\n'), ('reference', '9.2\n'),
                           ('9.0/suites', ''), ('9.2/suites', ''),
                           ('series', '# The patches\n'), ('topics', 'core\nlab\n'),
                           ('letters/core', 'be sparse\n\nText.\n')):
            write(f'{self.top}/patches/{name}', text)
        for base, lines in (('9.0', RAM[2:]), ('9.2', RAM)):
            tree = f'{self.top}/build/{base}/stock-tree'
            other = 'old_name' if base == '9.0' else 'new_name'
            write(f'{tree}/src/VERSION', f'{base}.1\n')
            write(f'{tree}/src/MAINTAINERS', 'M: Erika Mustermann <x@y>\n')
            write(f'{tree}/src/.gitignore', '*.gen\n')
            write(f'{tree}/src/firmware.gen', 'ignored, but a part of it\r\n')
            write(f'{tree}/src/migration/ram.c', ''.join(lines))
            write(f'{tree}/src/migration/other.c', f'int {other};\nint end;\n')
            write(f'{tree}/src.stamp', f'dir {base}\n')

        self.edit = self.other_tree('9.2')
        self.change('util/sparse.c', 'first\n',
                    commit='util: add sparse\n\nTopic: core')
        self.replace('migration/ram.c', 'int line_20;', 'sparse line_20;',
                     commit='migration/ram: be sparse\n\nBecause it is better.\n\n'
                     'Topic: core')
        write(f'{self.edit}/tests/unit/test-sparse.c', 'test\n')
        write(f'{self.edit}/docs/system/sparse.rst', 'text\n')
        self.change('MAINTAINERS', 'M: Erika Mustermann <x@y>\n\nSparse guest RAM\n'
                    'M: The sparse-ram project <qemu-devel@nongnu.org>\n',
                    commit='tests: test it\n\nTopic: core')
        self.save(self.edit, base='9.2')
        self.commit_project()
        shutil.rmtree(self.edit)
        self.edit = f'{self.top}/build/9.2/edit'

    def run_in(self, directory: str, *command: str, base: str = '9.2',
               code: int = 0, **env: str) -> str:
        """Runs a command, which has to end with the code."""
        result = subprocess.run(
            command, cwd=directory, env={**os.environ, **GIT, 'BASE': base, **env},
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False)
        self.assertEqual(result.returncode, code, (command, result.stdout))
        return result.stdout

    def script(self, name: str, *args: str, base: str = '9.2', code: int = 0) -> str:
        """Runs one of the project's."""
        return self.run_in(self.top, f'scripts/{name}', *args, base=base, code=code)

    def git(self, *args: str, code: int = 0) -> str:
        """Runs git in the edit tree."""
        return self.run_in(self.edit, 'git', *args, code=code)

    def other_tree(self, base: str) -> str:
        """A git tree of the base that make edit does not know of."""
        tree = os.path.join(os.path.dirname(self.top), 'tree')
        shutil.copytree(f'{self.top}/build/{base}/stock-tree/src', tree)
        for command in (('init', '-q'), ('add', '-A', '-f'),
                        ('commit', '-q', '-m', 'base'), ('tag', 'base')):
            self.run_in(tree, 'git', *command)
        return tree

    def save(self, *args: str, base: str = '9.2') -> None:
        """Saves it."""
        self.script('save-series', *args, base=base)

    def commit_project(self) -> None:
        """The project as it is, as its first or next commit."""
        self.run_in(self.top, 'git', 'init', '-q')
        self.run_in(self.top, 'git', 'add', '-A')
        self.run_in(self.top, 'git', 'commit', '-q', '--allow-empty', '-m', 'state')

    def make_edit(self, base: str = '9.2') -> None:
        """Makes the tree to work in."""
        self.script('edit-series', base=base)
        self.edit = f'{self.top}/build/{base}/edit'

    def change(self, file: str, text: str, commit: str = '') -> None:
        """Gives a file of the edit tree a new content."""
        write(f'{self.edit}/{file}', text)
        if commit:
            self.git('add', '-A')
            self.git('commit', '-q', '-m', commit)

    def replace(self, file: str, old: str, new: str, commit: str = '') -> None:
        """Changes a line of it."""
        text = read(f'{self.edit}/{file}')
        self.assertIn(old, text)
        self.change(file, text.replace(old, new), commit)

    def squash(self) -> None:
        """What git commit --fixup is for."""
        self.git('rebase', '-q', '-i', '--autosquash', 'base')

    def state(self) -> Dict[str, str]:
        """All of the project but for what is made."""
        names = self.run_in(self.top, 'git', 'ls-files', '-co',
                            '--exclude-standard').splitlines()
        return {name: read(os.path.join(self.top, name)) for name in names
                if os.path.exists(os.path.join(self.top, name))}

    def changed(self, before: Dict[str, str]) -> List[str]:
        """The files that are different."""
        after = self.state()
        return sorted(name for name in {*before, *after}
                      if before.get(name) != after.get(name))

    def trees(self) -> List[str]:
        """What the steps are, one after the other."""
        return self.git('log', '--format=%T %s', '--reverse',
                        'base~0..HEAD').splitlines()

    def refused(self, sentence: str, name: str = 'save-series', *args: str,
                base: str = '9.2') -> None:
        """It says why not in one line, and leaves everything alone."""
        before = self.state()
        output = self.script(name, *args, base=base, code=1)
        self.assertIn(sentence, output)
        self.assertEqual(len(output.splitlines()), 1, output)
        self.assertEqual(self.changed(before), [])


class RoundTrip(Project):
    """What is saved is what was there."""

    def test_nothing_changed(self) -> None:
        """Not a byte, for both bases."""
        for base in ('9.2', '9.0'):
            with self.subTest(base):
                self.make_edit(base)
                before = self.state()
                self.save(base=base)
                if base == '9.2':
                    self.assertEqual(self.changed(before), [])
                self.commit_project()
                before = self.state()
                self.make_edit(base)
                self.save(base=base)
                self.assertEqual(self.changed(before), [])

    def test_whole_base(self) -> None:
        """With what it ignores, and no line end touched."""
        self.make_edit()
        with open(f'{self.edit}/firmware.gen', 'rb') as file:
            self.assertTrue(file.read().endswith(b'\r\n'))
        self.assertIn('firmware.gen', self.git('ls-files'))

    def test_change_a_line(self) -> None:
        """One patch, or one file of ours, changes."""
        self.make_edit()
        before = self.state()
        self.replace('migration/ram.c', 'sparse line_20', 'sparser line_20')
        self.git('commit', '-q', '-a', '--fixup', ':/be sparse')
        self.squash()
        self.save()
        self.assertEqual(self.changed(before),
                         ['patches/migration-ram-be-sparse.patch'])
        before = self.state()
        self.change('util/sparse.c', 'better\n')
        self.git('commit', '-q', '-a', '--fixup', ':/add sparse')
        self.squash()
        self.save()
        self.assertEqual(self.changed(before), ['util/sparse.c'])

    def test_growing_file(self) -> None:
        """Each version is stored once: the last as a file, others as hunks."""
        self.make_edit()
        self.change('util/sparse.c', 'first\nsecond\n', 'util: grow')
        self.change('util/sparse.c', 'first\nsecond\nthird\n', 'util: grow more')
        trees = self.trees()
        self.save()
        self.assertRegex(read(f'{self.top}/patches/tests-test-it.patch'),
                         r'\nCompletes: docs/system/sparse.rst,'
                         r' tests/unit/test-sparse.c\n---\n(?!(.|\n)*sparse.rst)')
        patches = {name: read(f'{self.top}/patches/{name}.patch')
                   for name in ('util-add-sparse', 'util-grow', 'util-grow-more')}
        self.assertIn('+first\n', patches['util-add-sparse'])
        self.assertIn('+second\n', patches['util-grow'])
        self.assertNotIn('third', patches['util-grow-more'])
        self.assertEqual([name for name in patches if 'Completes:' in patches[name]],
                         ['util-grow-more'])
        self.assertEqual(read(f'{self.top}/util/sparse.c'), 'first\nsecond\nthird\n')
        self.make_edit()
        self.assertEqual(self.trees(), trees)

    def test_renamed_and_removed(self) -> None:
        """A file of ours that a later patch renames, and one that goes."""
        self.make_edit()
        self.git('mv', 'util/sparse.c', 'util/dense.c')
        self.git('rm', '-q', 'tests/unit/test-sparse.c')
        self.git('commit', '-q', '-m', 'util: rename it')
        trees = self.trees()
        self.save()
        self.assertTrue(os.path.exists(f'{self.top}/util/dense.c'))
        for name in ('util/sparse.c', 'tests/unit/test-sparse.c'):
            self.assertFalse(os.path.exists(f'{self.top}/{name}'))
        self.make_edit()
        self.assertEqual(self.trees(), trees)

    def test_no_other_renamed(self) -> None:
        """One more patch in front is one more file and one more line."""
        self.make_edit()
        self.git('reset', '-q', '--hard', 'base')
        self.replace('migration/other.c', 'end', 'fixed', 'migration: fix')
        self.git('cherry-pick', 'base..origin/9.2')
        before = self.state()
        self.save()
        self.assertEqual(self.changed(before),
                         ['patches/migration-fix.patch', 'patches/series'])

    def test_mailed(self) -> None:
        """Who applies the mails and saves them finds no trace of himself."""
        before = self.state()
        mails = os.path.join(os.path.dirname(self.top), 'mails')
        self.script('format-series', '-o', mails)
        shutil.rmtree(os.path.join(os.path.dirname(self.top), 'tree'),
                      ignore_errors=True)
        tree = self.other_tree('9.2')
        self.run_in(tree, 'git', 'am', '-q', *sorted(
            f'{mails}/{name}' for name in os.listdir(mails) if '-0000-' not in name))
        self.assertIn(f'M: {NAME} <{MAIL}>', read(f'{tree}/MAINTAINERS'))
        self.save(tree)
        self.assertEqual(self.changed(before), [])

    def test_times(self) -> None:
        """What a change leaves alone is not compiled again."""
        self.script('apply-series')
        src = f'{self.top}/build/9.2/patched-src'
        os.utime(f'{src}/migration/ram.c', (1, 1))
        before = {name: os.stat(f'{src}/{name}').st_mtime_ns
                  for name in ('migration/ram.c', 'util/sparse.c', 'VERSION')}
        write(f'{self.top}/util/sparse.c', 'other\n')
        self.script('apply-series')
        self.assertEqual(read(f'{src}/util/sparse.c'), 'other\n')
        self.assertEqual([name for name, when in before.items()
                          if os.stat(f'{src}/{name}').st_mtime_ns != when],
                         ['util/sparse.c'])


class Refused(Project):
    """What would lose work."""

    def test_edit(self) -> None:
        """Commits and changes that are not saved, which clean keeps as well."""
        self.make_edit()
        self.replace('migration/ram.c', 'line_30', 'l30')
        for name in ('edit-series', 'clean'):
            self.refused('build/9.2/edit has work that is not saved', name)
        self.git('commit', '-q', '-a', '-m', 'migration: more')
        self.refused('rm -rf build/9.2/edit discards it', 'edit-series')
        self.save()
        self.make_edit()

    def test_uncommitted(self) -> None:
        """A change, or a file that git does not know."""
        self.make_edit()
        self.change('util/new.c', 'new\n')
        self.refused('has changes that are in no commit')

    def test_rebase(self) -> None:
        """In the middle of one."""
        self.make_edit()
        self.git('rebase', '-q', '-x', 'false', 'base', code=1)
        self.refused('in the middle of a rebase')

    def test_project_changed(self) -> None:
        """Here, since the tree was made; or never seen there."""
        self.make_edit()
        write(f'{self.top}/util/sparse.c', 'newer\n')
        self.refused('have changed since build/9.2/edit was made')
        os.remove(f'{self.edit}/.git/sparse-ram')
        self.refused('does not say with which patches it began')
        self.commit_project()
        self.refused('has never had util/sparse.c as it is here')

    def test_commits(self) -> None:
        """That cannot be patches."""
        self.make_edit()
        self.replace('migration/ram.c', 'line_30', 'l30')
        self.git('commit', '-q', '-a', '--fixup', 'HEAD')
        self.refused('is not yet put into its commit')
        self.git('commit', '-q', '--amend', '-m', 'tests: test it')
        self.refused('two commits have the subject "tests: test it"')
        self.git('reset', '-q', '--hard', 'HEAD~1')
        self.git('checkout', '-q', '-b', 'side', 'HEAD~1')
        self.replace('migration/ram.c', 'line_30', 'l30', 'side')
        self.git('merge', '-q', '9.2')
        self.refused('has a merge')

    def test_text(self) -> None:
        """What a patch cannot say."""
        self.make_edit()
        self.replace('migration/ram.c', 'line_30', 'l30',
                     'migration: more\n\nabove\n---\nbelow')
        self.refused('the message of "migration: more" cannot be stored')

    def test_wrong_tree(self) -> None:
        """Of another base, or of none."""
        self.make_edit()
        self.refused('is QEMU 9.2: say BASE=9.2', 'save-series', self.edit, base='9.0')
        self.git('tag', '-d', 'base')
        self.refused('has no tag base')
        shutil.rmtree(self.edit)
        self.refused('make edit BASE=9.2 makes it')

    def test_not_in_a_patch(self) -> None:
        """A file of ours, or a patch, that nothing lists."""
        write(f'{self.top}/util/lonely.c', 'x\n')
        self.refused('util/lonely.c is in no patch', 'apply-series')
        os.remove(f'{self.top}/util/lonely.c')
        write(f'{self.top}/patches/lonely.patch', 'x\n')
        self.refused('patches/lonely.patch is in no series', 'apply-series')

    def test_does_not_apply(self) -> None:
        """Which file, and where."""
        path = f'{self.top}/patches/migration-ram-be-sparse.patch'
        write(path, read(path).replace(' int line_19;', ' int line_18;'))
        self.refused('migration-ram-be-sparse.patch does not apply to QEMU 9.2.1:'
                     ' patch failed: migration/ram.c:18', 'apply-series')


class OneSet(Project):
    """A base is what differs from the reference."""

    def test_same_is_stored_once(self) -> None:
        """An offset is no difference."""
        self.make_edit('9.0')
        self.save(base='9.0')
        self.assertEqual(sorted(os.listdir(f'{self.top}/patches/9.0')),
                         ['series', 'suites'])
        self.assertEqual(read(f'{self.top}/patches/9.0/series'), '')

    def test_what_differs(self) -> None:
        """A patch in front, another one instead, one left out."""
        self.make_edit('9.0')
        self.git('reset', '-q', '--hard', 'base')
        self.replace('migration/other.c', 'int end', 'int new_name, end',
                     'migration: backport')
        self.git('cherry-pick', 'base..origin/9.0~1')
        self.replace('migration/ram.c', 'sparse line_20', 'old_sparse line_20')
        self.git('commit', '-q', '-a', '--amend', '--no-edit')
        self.change('docs/system/sparse.rst', 'text\n')
        self.change('tests/unit/test-sparse.c', 'test\n', 'tests: test it otherwise')
        self.refused('tests-test-it-otherwise is in no patch of 9.2', base='9.0')
        self.git('commit', '-q', '--amend', '-m', 'tests: test it')
        trees = self.trees()
        self.save(base='9.0')
        self.assertRegex(
            read(f'{self.top}/patches/9.0/series'),
            r'\A\+migration-backport.patch\n'
            r'=migration-ram-be-sparse.patch [0-9a-f]{12}\n'
            r'=tests-test-it.patch [0-9a-f]{12}\n\Z')
        self.make_edit('9.0')
        self.assertEqual(self.trees(), trees)
        # 9.2 is none of its business.
        self.make_edit('9.2')
        self.assertIn('sparse line_20', read(f'{self.edit}/migration/ram.c'))

    def test_own_files(self) -> None:
        """They are the same for all bases."""
        self.make_edit('9.0')
        self.git('rm', '-q', 'util/sparse.c')
        self.git('commit', '-q', '--fixup', ':/add sparse')
        self.git('commit', '-q', '--amend', '-m', 'util: remove')
        self.refused('util/sparse.c is not in build/9.0/edit: files of ours are the'
                     ' same for all bases', base='9.0')
        self.git('reset', '-q', '--hard', 'origin/9.0')
        self.change('util/sparse.c', 'better\n')
        self.git('commit', '-q', '-a', '--fixup', ':/add sparse')
        self.squash()
        self.save(base='9.0')
        self.make_edit('9.2')
        self.assertEqual(read(f'{self.edit}/util/sparse.c'), 'better\n')

    def test_port(self) -> None:
        """What conflicts is left to git; the rest is carried over."""
        self.make_edit('9.0')
        self.make_edit()
        self.replace('migration/other.c', 'new_name', 'newer_name', 'migration: rename')
        self.replace('migration/ram.c', 'line_30', 'l30', 'migration: more')
        output = self.script('save-series')
        self.assertIn('9.0 needs make port BASE=9.0: migration-rename.patch', output)
        output = self.script('port-series', base='9.0', code=1)
        self.assertIn('"migration: rename" conflicts in migration/other.c', output)
        self.edit = f'{self.top}/build/9.0/edit'
        self.refused('in the middle of a rebase', base='9.0')
        self.change('migration/other.c', 'int older_name;\nint end;\n')
        self.git('add', '-A')
        self.git('rebase', '--continue')
        trees = self.trees()
        self.save(base='9.0')
        self.assertIn('=migration-rename.patch ',
                      read(f'{self.top}/patches/9.0/series'))
        # Once more: what is known does not conflict again.
        self.assertIn('carried over', self.script('port-series', base='9.0'))
        self.assertEqual(self.trees(), trees)

    def test_reference(self) -> None:
        """Another base becomes it, and all commits stay what they are."""
        self.make_edit('9.0')
        self.replace('migration/ram.c', 'sparse line_20', 'old_sparse line_20')
        self.git('commit', '-q', '-a', '--amend', '--no-edit')
        self.save(base='9.0')
        self.refused('not committed', 'make-reference', base='9.0')
        self.commit_project()
        before = self.state()
        trees = {}
        for base in ('9.0', '9.2'):
            self.make_edit(base)
            trees[base] = self.trees()
        for reference in ('9.0', '9.2'):
            self.script('make-reference', base=reference)
            self.assertEqual(read(f'{self.top}/patches/reference'), f'{reference}\n')
            self.commit_project()
            for base, expected in trees.items():
                self.make_edit(base)
                self.assertEqual(self.trees(), expected, (reference, base))
            self.refused('the reference already', 'make-reference',
                         base=reference)
        # But for a comment, all is as it was.
        self.assertEqual([name for name in self.changed(before)
                          if name.startswith('patches/')], ['patches/9.0/series'])
        self.assertEqual(read(f'{self.top}/patches/9.0/series').splitlines()[2:],
                         before['patches/9.0/series'].splitlines())
