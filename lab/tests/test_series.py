# SPDX-License-Identifier: GPL-2.0-or-later
"""The series as complete patches: what format-series writes, and dep3 makes of it."""

import email.parser
import fnmatch
import glob
import os
import re
import shutil
import subprocess
import tempfile
import unittest
from importlib.machinery import SourceFileLoader
from typing import Dict, List

from lab.base import BUILD, ROOT
from lab.tests import MAIL, NAME, WHO, read

STOCK = os.path.join(BUILD, 'stock-src')
PATCHED = os.path.join(BUILD, 'patched-src')


def run(*command: str, cwd: str = ROOT, env: Dict[str, str] = WHO,
        check: bool = True) -> 'subprocess.CompletedProcess[str]':
    """Runs a command; its output, both kinds together, is text."""
    result = subprocess.run(command, cwd=cwd, env=dict(os.environ, **env),
                            text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            check=False)
    if check and result.returncode:
        raise AssertionError(f'{" ".join(command)}: {result.stdout[-2000:]}')
    return result


def files_in(patch: str) -> List[str]:
    """The files that a patch is about, relative to QEMU's tree."""
    return re.findall(r'^diff --git a/(\S+) b/', patch, re.MULTILINE)


def new_files_in(patch: str) -> List[str]:
    """Those that it brings."""
    return re.findall(r'^diff --git a/(\S+) b/\S+\nnew file', patch, re.MULTILINE)


def subject_of(path: str) -> str:
    """The subject of a mail, without its number."""
    header = email.parser.Parser().parsestr(read(path), headersonly=True)
    return re.sub(r'^\[.*?\] ', '', ' '.join(header['Subject'].split()))


def maintained(text: str, title: str = '') -> List[str]:
    """The patterns of a MAINTAINERS file, of one section or of all."""
    if title:
        text = re.split(r'\n\n', text[text.index(f'\n{title}\n') + 1:], 1)[0]
    return re.findall(r'^F: (\S+)$', text, re.MULTILINE)


def is_listed(path: str, patterns: List[str]) -> bool:
    """Whether get_maintainer.pl would find the file."""
    return any(fnmatch.fnmatchcase(path, pattern) or
               (pattern.endswith('/') and path.startswith(pattern))
               for pattern in patterns)


@unittest.skipUnless(os.path.isdir(STOCK), "there is no QEMU source; make source")
@unittest.skipUnless(shutil.which('git'), 'git is not installed')
class Series(unittest.TestCase):
    """What a maintainer gets by mail."""

    directory: 'tempfile.TemporaryDirectory[str]'
    mails: List[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.directory = tempfile.TemporaryDirectory(prefix='sparse-ram-')
        run('scripts/format-series', '-o', cls.directory.name)
        cls.mails = sorted(glob.glob(f'{cls.directory.name}/v1-*.patch'))

    @classmethod
    def tearDownClass(cls) -> None:
        cls.directory.cleanup()

    def test_git_am(self) -> None:
        """git am takes it on the base, and makes the tree that is tested."""
        touched = {file for mail in self.mails for file in files_in(read(mail))}
        with tempfile.TemporaryDirectory(prefix='sparse-ram-') as repo:
            run('git', 'init', '-q', repo)
            for file in touched:
                if os.path.exists(os.path.join(STOCK, file)):
                    os.makedirs(os.path.dirname(os.path.join(repo, file)),
                                exist_ok=True)
                    shutil.copy(os.path.join(STOCK, file), os.path.join(repo, file))
            run('git', 'add', '-A', cwd=repo)
            run('git', 'commit', '-q', '-m', 'base', cwd=repo)
            run('git', '-c', 'apply.whitespace=error', 'am', '-q',
                *self.mails, cwd=repo)
            # What is not mailed changes it once more
            for file in sorted(touched - {'MAINTAINERS', 'tests/qtest/meson.build'}):
                with self.subTest(file):
                    self.assertEqual(read(os.path.join(repo, file)),
                                     read(os.path.join(PATCHED, file)))

    def test_messages(self) -> None:
        """Each is signed off, and has more to say than its subject."""
        for mail in self.mails:
            with self.subTest(os.path.basename(mail)):
                message, _, _ = read(mail).partition('\n---\n')
                self.assertIn(f'\nSigned-off-by: {NAME} <{MAIL}>', message)
                self.assertGreater(len(message.partition('\n\n')[2].split()), 30)
                self.assertNotIn('New file', message)
                self.assertNotIn('\nTopic: ', message)

    def test_topics(self) -> None:
        """Each topic is mailed by itself; together, they are the series."""
        letters = os.path.join(ROOT, 'patches/letters')
        subjects = []
        for topic in read(os.path.join(ROOT, 'patches/topics')).splitlines():
            if not os.path.exists(os.path.join(letters, topic)):
                continue
            with self.subTest(topic):
                run('scripts/format-series', topic)
                cover, *mails = sorted(glob.glob(
                    f'{ROOT}/build/series/{topic}/v1-*.patch'))
                text = read(cover)
                title = read(os.path.join(letters, topic)).splitlines()[0]
                self.assertRegex(text, f'0+/{len(mails)}] {re.escape(title)}\n')
                self.assertNotIn('***', text)
                subjects += [subject_of(mail) for mail in mails]
        self.assertEqual(subjects, [subject_of(mail) for mail in self.mails
                                    if '-backport-' not in mail])

    @unittest.skipUnless(os.path.exists('/usr/lib/git-core/git-send-email'),
                         'git-email is not installed')
    def test_send_email(self) -> None:
        """A topic is one thread, to the list and who has to do with a patch."""
        run('scripts/format-series', 'fixes')
        log = run('git', 'send-email', '--dry-run', '--confirm=never', '--from', MAIL,
                  '--to', 'qemu-devel@nongnu.org', f'{ROOT}/build/series/fixes').stdout
        first, *others = log.split('\nResult: OK\n')[:-1]
        patches = glob.glob(f'{ROOT}/build/series/fixes/v1-*.patch')
        self.assertEqual(len(others), len(patches) - 1, log)
        identity = re.search('^Message-Id: (.*)$', first, re.MULTILINE)
        assert identity
        for mail in others:
            self.assertIn(f'\nIn-Reply-To: {identity[1]}\n', mail)
        self.assertLessEqual(set(re.findall('RCPT TO:<(.*)>', log)),
                             {'qemu-devel@nongnu.org', 'qemu-stable@nongnu.org', MAIL})

    def test_unknown_topic(self) -> None:
        """One sentence says which there are."""
        result = run('scripts/format-series', 'none', check=False)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stdout,
                         r'^\S+: there is no topic none; .*: fixes core .*\n$')

    def test_checkpatch(self) -> None:
        """Nothing to complain of, warnings included."""
        for mail in self.mails:
            with self.subTest(os.path.basename(mail)):
                run('perl', '-X', f'{STOCK}/scripts/checkpatch.pl', '--no-tree',
                    '--quiet', mail)

    def test_maintainers(self) -> None:
        """QEMU's section has what the series brings, and who has sent it."""
        text = ''.join(
            line[1:] + '\n'
            for mail in self.mails
            for line in read(mail).splitlines() if re.match(r'\+[MSF]: ', line))
        self.assertIn(f'M: {NAME} <{MAIL}>\n', text)
        patterns = maintained(text)
        for mail in self.mails:
            if '-backport-' in mail:
                continue        # QEMU has these files by now, and lists them
            for file in new_files_in(read(mail)):
                with self.subTest(file):
                    self.assertTrue(is_listed(file, patterns))

    def test_dep3(self) -> None:
        """The header that a package wants, in front of the same patch."""
        dep3 = SourceFileLoader(
            'dep3', os.path.join(ROOT, 'scripts/dep3')).load_module()
        for mail in self.mails:
            with self.subTest(os.path.basename(mail)):
                text = dep3.convert(read(mail), 'other, us', 'not-needed')
                header, _, patch = text.partition('\n---\n')
                fields: Dict[str, str] = {}
                for line in header.splitlines():
                    # Continuation lines are indented, and never empty.
                    self.assertRegex(line, r'^( \S| {2,}\S|[A-Z][A-Za-z-]+: \S)')
                    if line[0] != ' ':
                        name, _, value = line.partition(': ')
                        fields[name] = value
                self.assertEqual(fields['Author'], f'{NAME} <{MAIL}>')
                self.assertRegex(fields['Last-Update'], r'^\d{4}-\d\d-\d\d$')
                self.assertNotIn('[PATCH', fields['Description'])
                self.assertEqual((fields['Origin'], fields['Forwarded']),
                                 ('other, us', 'not-needed'))
                self.assertTrue(patch and read(mail).endswith(patch))


class Identity(unittest.TestCase):
    """Who is asked for, and who not."""

    @unittest.skipUnless(os.path.isdir(STOCK), "there is no QEMU source; make source")
    def test_unknown(self) -> None:
        """Nobody signs off what he did not say he would."""
        with tempfile.TemporaryDirectory(prefix='sparse-ram-') as home:
            result = run('env', *(option for name in WHO
                                  for option in ('-u', name)),
                         '-u', 'EMAIL', 'GIT_CONFIG_NOSYSTEM=1',
                         f'GIT_CONFIG_GLOBAL={home}/none', f'HOME={home}',
                         f'XDG_CONFIG_HOME={home}',
                         'scripts/format-series', '-o', home,
                         env={}, check=False)
            local = run('git', 'config', '--local', 'user.email', check=False)
            if local.returncode == 0:
                self.skipTest('this clone itself says who its user is')
            self.assertEqual(result.returncode, 1)
            self.assertIn('user.name and user.email', result.stdout)
            self.assertEqual(len(result.stdout.splitlines()), 1)
            self.assertEqual(glob.glob(f'{home}/*.patch'), [])


class Maintainers(unittest.TestCase):
    """The file of this repository."""

    @unittest.skipUnless(os.path.exists(os.path.join(ROOT, '.git')),
                         'this is not a git clone')
    def test_all_files(self) -> None:
        """Every file has somebody who looks after it."""
        patterns = maintained(read(os.path.join(ROOT, 'MAINTAINERS')))
        for file in run('git', 'ls-files').stdout.splitlines():
            if '/' not in file and (file[0] == '.' or file == 'MAINTAINERS'):
                continue
            with self.subTest(file):
                self.assertTrue(is_listed(file, patterns))

    def test_no_stale_patterns(self) -> None:
        """And every pattern has a file."""
        for pattern in maintained(read(os.path.join(ROOT, 'MAINTAINERS'))):
            with self.subTest(pattern):
                self.assertTrue(glob.glob(os.path.join(ROOT, pattern)))
