# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of what lab.kernels reads from a kernel's console."""

import unittest

from lab.kernels.__main__ import TESTS, Summary, directories

SAID = '''kernel: 6.1.0
answer: cachestat no, Function not implemented
answer: SEEK_DATA yes
ok 1 /sparse-file/a
ok 2 /sparse-file/b # SKIP no huge pages
test: test-sparse-file 0
test: test-populated-memory 0
ok 1 /ram-holes/a
not ok 2 /ram-holes/b
test: test-ram-holes 1
ok 1 /x86_64/a
test: qtests 0
ok 1 /x86_64/a
test: qtests, swapping 0
swapped: 0
'''


class SummaryTest(unittest.TestCase):
    """Summary, and what goes into the initramfs."""

    def test_summary(self) -> None:
        """What is good, what is not, and why something was skipped."""
        for text in (SAID, SAID.replace('\n', '\r\n')):
            said = Summary.of(text)
            self.assertEqual(said.version, '6.1.0')
            self.assertEqual(said.answers['SEEK_DATA'], 'yes')
            self.assertEqual(said.answers['cachestat'],
                             'no, Function not implemented')
            self.assertEqual(list(said.tests.values()), [
                '1 ok, 1 skipped', 'status 0', 'status 1', '1 ok, 0 skipped',
                '1 ok, 0 skipped'])
            self.assertEqual(said.skipped, [('/sparse-file/b', 'no huge pages')])
            self.assertEqual(list(said.problems()), [
                'test-populated-memory: status 0', 'test-ram-holes: status 1',
                'nothing was swapped out'])

    def test_silence(self) -> None:
        """A kernel that says nothing has run nothing."""
        self.assertEqual(list(Summary.of('').problems()), [
            *(f'{name}: not run' for name in TESTS), 'nothing was swapped out'])

    def test_directories(self) -> None:
        """The outer ones come first."""
        self.assertEqual(directories(['a/b/c', 'a/d']), ['a', 'a/b'])


if __name__ == '__main__':
    unittest.main()
