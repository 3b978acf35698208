# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/jobs.py."""

import itertools
import os
import unittest

from lab.jobs import side_by_side, within


class SideBySide(unittest.TestCase):
    def test_all_once_and_no_more_than_there_is_room_for(self):
        for processes in (False, True):
            taken = []
            tasks = (taken.append(number) or number for number in range(20))
            for done, result in enumerate(side_by_side(abs, tasks, 2, processes)):
                # Two may be done when the first of them is told
                self.assertLessEqual(len(taken), done + 2)
                self.assertIn(result, taken)
            self.assertEqual(taken, list(range(20)))

    def test_processes_are_others(self):
        pids = set(side_by_side(os.path.realpath, ['/proc/self'] * 4, 1, True))
        self.assertNotIn(os.path.realpath('/proc/self'), pids)

    def test_who_wants_no_more_gets_no_more(self):
        for result in side_by_side(abs, itertools.count(), 3):
            if result > 5:
                break

    def test_no_time(self):
        self.assertEqual(list(within(itertools.count(), 1e-9)), [])
        self.assertEqual(list(within([1, 2], None)), [1, 2])
