# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/ci/sanitizers.py."""

import os
import tempfile
import unittest

from lab.ci import sanitizers

RACE = '''==================
WARNING: ThreadSanitizer: data race (pid=12)
  Write of size 8 at 0x7b1c by thread T3 (mutexes: write M0):
    #0 memcpy ../../../../src/libsanitizer/tsan/tsan.cpp:10 (libtsan.so.2+0x4)
    #1 writes ../src/migration/old.c:2 (qemu-system-x86_64+0x1f)
    #2 start_thread <null> (libc.so.6+0x1)

  Previous atomic read of size 8 at 0x7b1c by main thread:
    #0 reads ../src/migration/old.c:4 (qemu-system-x86_64+0x2f)
    #1 main ../src/system/main.c:4 (qemu-system-x86_64+0x3f)

  Location is heap block of size 64 at 0x7b1c allocated by main thread:
    #0 malloc ../../../../src/libsanitizer/tsan/tsan.cpp:9 (libtsan.so.2+0x3)
    #1 allocates ../src/migration/ours.c:7 (qemu-system-x86_64+0x4f)

  Thread T3 'mig' (tid=15, running) created by main thread at:
    #0 pthread_create ../../../../src/libsanitizer/tsan.cpp:9 (libtsan.so.2)
    #1 creates ../src/migration/ours.c:8 (qemu-system-x86_64+0x5f)

SUMMARY: ThreadSanitizer: data race ../src/migration/old.c:2 in writes
==================
'''

LEAKS = '''
=================================================================
==9==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 24 byte(s) in 1 object(s) allocated from:
    #0 0x7f in __interceptor_malloc ../../../../src/libsanitizer/asan/a.cpp:69
    #1 0x55 in leaks /somewhere/build/../src/migration/old.c:2

Indirect leak of 8 byte(s) in 1 object(s) allocated from:
    #0 0x7f in __interceptor_malloc ../../../../src/libsanitizer/asan/a.cpp:69
    #1 0x55 in leaks_ours ../src/migration/ours.c:2

SUMMARY: AddressSanitizer: 32 byte(s) leaked in 2 allocation(s).
'''

OVERFLOW = '''=================================================================
==9==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60 at pc 0x55
READ of size 4 at 0x60 thread T0
    #0 0x55 in overflows ../src/migration/old.c:3
    #1 0x56 in main ../src/system/main.c:4
'''

UNDEFINED = '''../src/migration/old.c:4:2: runtime error: shift exponent 64 is too large
    #0 0x55 in shifts ../src/migration/old.c:4
'''


class Sanitizers(unittest.TestCase):
    def setUp(self) -> None:
        self.top = self.enterContext(tempfile.TemporaryDirectory())
        for tree, name, text in (
                ('stock', 'old.c', 'one\ntwo\nfour\n'),
                ('patched', 'old.c', 'one\ntwo\nthree\nfour\n'),
                ('patched', 'ours.c', '')):
            path = f'{self.top}/{tree}/migration'
            os.makedirs(path, exist_ok=True)
            with open(f'{path}/{name}', 'w', encoding='ascii') as file:
                file.write(text)
        self.ownership = sanitizers.Ownership(f'{self.top}/stock',
                                              f'{self.top}/patched')

    def listed(self, text: str) -> sanitizers.Listed:
        path = f'{self.top}/list'
        with open(path, 'w', encoding='ascii') as file:
            file.write(text)
        return sanitizers.Listed(path)

    def judge(self, log: str, known: str = '') -> sanitizers.Verdict:
        os.makedirs(f'{self.top}/logs', exist_ok=True)
        with open(f'{self.top}/logs/tsan.1', 'w', encoding='ascii') as file:
            file.write(log)
        return sanitizers.judge(
            sanitizers.read_directory(f'{self.top}/logs'), self.ownership,
            self.listed(known))

    def test_race(self):
        """Only what was done says whose it is."""
        verdict = self.judge(RACE)
        self.assertEqual(list(verdict.unlisted), ['race:reads,writes'])
        self.assertFalse(verdict.ours or verdict.listed)

    def test_race_listed(self):
        for known in ('race:reads,writes', '# why\nrace:*,wri*  # comment'):
            verdict = self.judge(RACE + RACE, known)
            self.assertEqual(verdict.listed, {'race:reads,writes': 2})
            self.assertFalse(verdict.ours or verdict.unlisted)

    def test_race_not_listed(self):
        """Not by a function that is further out, or of another kind."""
        for known in ('race:main', 'race:reads', 'race:writes', 'leak:reads'):
            self.assertTrue(self.judge(RACE, known).unlisted)

    def test_race_ours(self):
        """In a line of ours, or called by a file of ours; listed or not."""
        for ours in (RACE.replace('old.c:2', 'old.c:3'),
                     RACE.replace('migration/old.c:4', 'migration/ours.c:1'),
                     RACE.replace('system/main.c:4', 'migration/ours.c:1')):
            verdict = self.judge(ours, 'race:*')
            self.assertEqual(list(verdict.ours), ['race:reads,writes'])
            self.assertIn('Previous atomic read',
                          ''.join(verdict.ours['race:reads,writes'].text))

    def test_race_of_stock_in_a_changed_line(self):
        """It is the same race if both functions are named."""
        name = 'race:reads,writes'
        for ours in (RACE.replace('old.c:2', 'old.c:3'),
                     RACE.replace('system/main.c:4', 'migration/ours.c:1')):
            self.assertEqual(list(self.judge(ours, name).listed), [name])
            self.assertEqual(list(self.judge(ours, 'race:*').ours), [name])

    def test_race_called(self):
        """A line of ours that has called QEMU's function is none of ours."""
        log = RACE.replace('system/main.c:4', 'migration/old.c:3')
        self.assertFalse(self.judge(log).ours)

    def test_leaks(self):
        verdict = self.judge(LEAKS, 'leak:leaks')
        self.assertEqual(list(verdict.listed), ['leak:leaks'])
        self.assertEqual(list(verdict.ours), ['leak:leaks_ours'])
        verdict = self.judge(LEAKS.replace('old.c:2', 'old.c:3'), 'leak:leaks')
        self.assertEqual(len(verdict.ours), 2)

    def test_overflow(self):
        verdict = self.judge(OVERFLOW)
        self.assertEqual(list(verdict.ours), ['heap-buffer-overflow:overflows'])

    def test_undefined(self):
        verdict = self.judge(UNDEFINED)
        self.assertEqual(list(verdict.unlisted),
                         ['shift exponent 64 is too large:shifts'])
        self.assertTrue(self.judge(UNDEFINED, 'shift exponent*:shifts').listed)

    def test_nothing(self):
        verdict = self.judge("==1==WARNING: ASan doesn't fully support "
                             "makecontext/swapcontext functions\n")
        self.assertFalse(verdict.ours or verdict.unlisted or verdict.listed)
