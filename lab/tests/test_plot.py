# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/plot.py."""

import os
import tempfile
import unittest
from unittest import mock


from lab import UserError, plot
from lab.memory import GIB, MIB


class Values(unittest.TestCase):
    def test_sizes_are_doubled(self):
        self.assertEqual([size // GIB for size in plot.sizes(9 * GIB)], [1, 2, 4, 8])

    def test_a_line_keeps_its_corners(self):
        samples = [(time, 5 * MIB, rss * MIB) for time, rss in
                   enumerate((1, 1, 1, 4, 6, 6, 6))]
        self.assertEqual(plot.thin(samples, 2, MIB),
                         [(0, 1), (2, 1), (3, 4), (4, 6), (5, 6), (6, 6)])
        self.assertEqual(plot.thin(samples, 1, MIB), [(0, 5), (5, 5), (6, 5)])
        self.assertEqual(plot.thin([], 1), [])

    def test_small_steps_are_left_out(self):
        samples = [(time, 0, rss * MIB) for time, rss in
                   enumerate((1, 2, 3, 9, 10, 11))]
        self.assertEqual(plot.thin(samples, 2, 5 * MIB),
                         [(0, 1), (2, 3), (3, 9), (4, 10), (5, 11)])


class Files(unittest.TestCase):
    def setUp(self):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(directory, 'file')
        self.plot = plot.Plot(directory, 'name', 'series,x,y')

    def test_values_come_back(self):
        self.plot.write([['one, two', 1, 2.5], ['three', 3, 4.0]], ['size: 7'])
        comments, rows = self.plot.read()
        self.assertEqual(rows, [['one, two', '1', '2.5'], ['three', '3', '4.0']])
        self.assertEqual(comments, [plot.report.LICENCE, 'size: 7', 'series,x,y'])

    def test_missing(self):
        with self.assertRaises(UserError):
            self.plot.read()

    def test_every_series_is_drawn(self):
        self.plot.write([['a', 1, 2.5], ['b', 3, 4.0], ['b', 5, 6.0]], [])
        scripts = []
        with mock.patch.object(plot, '_gnuplot', scripts.append), \
             mock.patch.object(plot, '_label_svg'):
            self.plot.draw('set nothing\n', 'with lines dt {dash}')
        script, = scripts
        self.assertIn("$series1 << END\n3 4.0\n5 6.0\nEND\n", script)
        self.assertIn("$series0 with lines dt 1 title 'a'", script)

    def test_svg_says_its_licence(self):
        with open(self.path, 'w', encoding='utf-8') as file:
            file.write('<?xml version="1.0"?>\n<svg>  \n</svg>')
        plot._label_svg(self.path)
        with open(self.path, encoding='utf-8') as file:
            self.assertEqual(file.read(), '<?xml version="1.0"?>\n'
                             f'<!-- {plot.report.LICENCE} -->\n<svg>\n</svg>\n')
