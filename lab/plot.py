# SPDX-License-Identifier: GPL-2.0-or-later
"""Plot what migration costs, with and without the patches.

Measures how long the migration of a guest with little data takes at different
sizes of RAM, and how much memory both sides of one migration have while it
goes on.  The guests never run.  Writes the values as CSV, and plots of them as
SVG, which gnuplot draws.  Progress goes to standard error.

Exit status: 0 if all is done; 1 if a migration failed; 2 for a mistake on the
command line or something missing.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from lab import UserError, memory
from lab.base import ROOT
from lab.cli import (add_qemu_arguments, add_size_arguments, memory_floor,
                     ready, run_main, say)
from lab.measure import report
from lab.measure.operation import (MeasureConfig, Migrate, Operation, Session,
                                   Times, measure)
from lab.memory import GIB, MIB, format_size
from lab.qemu import pick_accelerator

# Not docs/devel, which becomes QEMU's with the series
DIRECTORY = os.path.join(ROOT, 'docs/results')

DATA = 64 * MIB                 # scattered over all of RAM
SMALLEST = 1 * GIB
# Of each point, in rounds, so that a busy minute does not spoil one of them
RUNS = 3
# What takes longer is measured once
SLOW = 30.0                     # seconds

RSS_INTERVAL = 0.01             # seconds between two looks at RSS
RSS_LEAD = 0.5                  # seconds of looking before the migration
RSS_TAIL = 0.5                  # and after it, at least
RSS_STEP = 64 * MIB             # what a line does not need to show

# How to draw a series, by the columns after its name
_TIME_LINE = 'using 1:4:3:5 with yerrorlines lw 2 pt 7 ps 0.6'
# Two sides can be where one is, so the second one is dashed
_RSS_LINE = 'using 1:2 with lines lw 2 dt {dash}'

# Series: name, which QEMU, capabilities
Series = Tuple[str, str, Tuple[str, ...]]
STOCK: Series = ('stock', 'stock', ())
PATCHED: Series = ('patched', 'patched', ())
SPARSE_RAM: Series = ('patched, sparse-ram', 'patched', ('sparse-ram',))

_STYLE = """\
set grid xtics ytics lt 1 lc rgb '#dddddd'
set key left top reverse Left
set tics nomirror
set border 3
"""

_TIME = """\
set title 'Precopy over tcp, idle guest with {data} of data, {accel}'
set xlabel 'guest RAM (memfd), GiB'
set ylabel 'total time, seconds'
set logscale x 2
set logscale y 10
set xrange [0.8:*]
"""

_RSS = """\
set title 'Precopy over tcp, {size} of memfd with {data} of data, {accel}'
set xlabel 'time since the migration was started, seconds'
set ylabel 'RSS, MiB'
set yrange [0:*]
set key right center
"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n', 1)[0])
    add_qemu_arguments(parser)
    parser.add_argument('--draw', action='store_true',
                        help='measure nothing: draw the CSV files that are '
                             'there')
    add_size_arguments(parser, 1024 * GIB, 4 * GIB)
    parser.add_argument('--directory', metavar='DIR', default=DIRECTORY,
                        help='where the files are (default '
                             f'{os.path.relpath(DIRECTORY, ROOT)})')
    args = parser.parse_args()
    if min(args.size, args.stock_size) < SMALLEST:
        parser.error(f'the smallest guest has {format_size(SMALLEST)}')
    return args


class Plot:
    """The files of one plot.  Every row of the CSV begins with its series."""

    def __init__(self, directory: str, name: str, columns: str):
        self._base = os.path.join(directory, name)
        self._csv = f'{self._base}.csv'
        self._columns = columns

    def write(self, rows: Sequence[Sequence[object]], comments: Sequence[str]) -> None:
        """Replace the values."""
        with open(self._csv, 'w', encoding='utf-8') as file:
            for line in (report.LICENCE, *comments, self._columns):
                file.write(f'# {line}\n')
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator='\n')
            writer.writerows([round(value, 3) if isinstance(value, float) else value
                              for value in row] for row in rows)

    def read(self) -> Tuple[List[str], List[List[str]]]:
        """The comments, and the rows."""
        try:
            with open(self._csv, encoding='utf-8') as file:
                lines = file.read().splitlines()
        except OSError as err:
            raise UserError(f'cannot read {self._csv}: {err.strerror}; '
                            'without --draw it is made') from err
        return ([line[2:] for line in lines if line.startswith('# ')],
                list(csv.reader(line for line in lines if line[0] != '#')))

    def draw(self, script: str, line: str) -> None:
        """Make the SVG of what is in the CSV.

        script: what comes before gnuplot's plot command.
        line: how each of the series is drawn; {dash}: 1 or 2 in turns.
        """
        rows = self.read()[1]
        names = list(dict.fromkeys(row[0] for row in rows))
        script += ''.join(_data_block(number, [row[1:] for row in rows
                                               if row[0] == name])
                          for number, name in enumerate(names))
        script += 'plot ' + ', '.join(
            f'$series{number} {line.format(dash=1 + number % 2)} '
            f"title '{name}'"
            for number, name in enumerate(names)) + '\n'
        svg = f'{self._base}.svg'
        _gnuplot("set terminal svg size 800,500 font 'sans-serif,14' "
                 f"background 'white'\nset output '{svg}'\n{_STYLE}{script}")
        _label_svg(svg)


def _data_block(number: int, rows: Sequence[Sequence[str]]) -> str:
    lines = '\n'.join(' '.join(row) for row in rows)
    return f'$series{number} << END\n{lines}\nEND\n'


def _gnuplot(script: str) -> None:
    done = subprocess.run(['gnuplot', '-'], input=script, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)
    if done.returncode or done.stdout:
        raise UserError(f'gnuplot failed: {done.stdout.strip()}')


def _label_svg(path: str) -> None:
    """Say what licence it has, after the XML declaration."""
    with open(path, encoding='utf-8') as file:
        first, rest = file.read().split('\n', 1)
    with open(path, 'w', encoding='utf-8') as file:
        # What gnuplot leaves at the end of lines, style checks do not like
        lines = [line.rstrip() for line in rest.splitlines()]
        file.write('\n'.join([first, f'<!-- {report.LICENCE} -->', *lines]) + '\n')


# Measuring

class Watched(Operation):
    """An operation during which the RSS of both sides is looked at.

    samples: seconds since it began, bytes of either side.
    """
    loads = True

    def __init__(self, operation: Operation, seconds: float = 0):
        """seconds: to look for, at least"""
        self._operation = operation
        self._seconds = seconds
        self.samples: List[Tuple[float, int, int]] = []

    def run(self, session: Session) -> Times:
        """Do it."""
        assert session.destination
        guests = session.source, session.destination
        stop = threading.Event()
        began = time.monotonic() + RSS_LEAD

        def look() -> None:
            while not stop.wait(RSS_INTERVAL):
                source, destination = (guest.sample().rss for guest in guests)
                self.samples.append((time.monotonic() - began, source, destination))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            time.sleep(RSS_LEAD)
            times = self._operation.run(session)
            time.sleep(max(RSS_TAIL, began + self._seconds - time.monotonic()))
        finally:
            stop.set()
            thread.join()
        return times


def sizes(largest: int) -> Iterator[int]:
    """Of guests to be measured: doubled each time."""
    size = SMALLEST
    while size <= largest:
        yield size
        size *= 2


def thin(samples: Sequence[Tuple[float, int, int]], side: int,
         step: int = RSS_STEP) -> List[Tuple[float, int]]:
    """Of the samples of one side (1 or 2), those that the line needs: where
    it has changed by a step, and the ends.  In MiB.
    """
    kept: List[Tuple[float, int]] = []
    for number, sample in enumerate(samples):
        point = sample[0], round(sample[side] / MIB)
        is_end = number in (0, len(samples) - 1)
        changed = bool(kept) and abs(point[1] - kept[-1][1]) * MIB >= step
        if kept and (is_end or changed):
            # Where the line was before it changed
            last = samples[number - 1]
            before = last[0], round(last[side] / MIB)
            if before != kept[-1]:
                kept.append(before)
        if is_end or changed:
            kept.append(point)
    return kept


class Plotter:
    """Does the measurements and the drawing."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._floor = memory_floor()
        self._accel = args.accel or pick_accelerator()
        self._versions: Dict[str, str] = {}
        self._largest = memory.largest_mappable(args.size)
        self._largest_full = min(self._largest, memory.survivable(
            args.stock_size, memory.available(), self._floor))
        self._time = Plot(args.directory, 'sparse-ram-time',
                          'series,guest RAM in GiB,runs,'
                          'shortest,median,longest total time in seconds')
        self._rss = Plot(args.directory, 'sparse-ram-rss',
                         'series,seconds since the start,RSS in MiB')

    def _measure(self, operation: Operation, series: Series, size: int) -> float:
        """Returns seconds."""
        done = measure(operation, MeasureConfig(
            binary=getattr(self._args, series[1]), size=size,
            directory=self._args.directory, scatter=DATA,
            capabilities=series[2], accel=self._accel, verify=False,
            extra_args=tuple(self._args.qemu_args),
            memory_floor=self._floor))
        self._versions[series[1]] = done.version
        say(f'  {series[0]}, {format_size(size)}: {done.times.total:.3f} s')
        return done.times.total

    def measure_times(self) -> None:
        """How long it takes at each size."""
        points: Dict[Tuple[Series, int], List[float]] = {
            (series, size): []
            for series, largest in ((STOCK, self._largest_full),
                                    (PATCHED, self._largest),
                                    (SPARSE_RAM, self._largest))
            for size in sizes(largest)}
        for _ in range(RUNS):
            for (series, size), times in points.items():
                if not times or max(times) < SLOW:
                    times.append(self._measure(Migrate(), series, size))
        rows = [(series[0], size // GIB, len(times), min(times),
                 statistics.median(times), max(times))
                for (series, size), times in points.items()]
        self._time.write(rows, self._comments(
            f'{format_size(SMALLEST)} to {format_size(self._largest)}'))

    def measure_rss(self) -> None:
        """What both sides have while it goes on."""
        rows: List[Sequence[object]] = []
        seconds = 0.0
        for series in (STOCK, PATCHED):
            watched = Watched(Migrate(), seconds)
            self._measure(watched, series, self._largest_full)
            for side, name in ((1, 'source'), (2, 'destination')):
                rows += [[f'{series[0]}, {name}', *point]
                         for point in thin(watched.samples, side)]
            seconds = watched.samples[-1][0]
        self._rss.write(rows, self._comments(format_size(self._largest_full)))

    def _comments(self, size: str) -> List[str]:
        """What the values depend on."""
        versions = ', '.join(f'{name} QEMU {version}' for name, version
                             in sorted(self._versions.items()))
        return ['made by: make plot', report.origin(),
                f'{versions}; shmem huge pages: '
                f'{report.machine()["shmem_thp"]}',
                f'accelerator: {self._accel}',
                f'guest RAM: {size}']

    def draw(self) -> None:
        """Draw what the CSV files have."""
        for plot, script, line in ((self._time, _TIME, _TIME_LINE),
                                   (self._rss, _RSS, _RSS_LINE)):
            comments = plot.read()[0]
            plot.draw(script.format(
                data=format_size(DATA), size=_said(comments, 'guest RAM'),
                accel=_said(comments, 'accelerator').upper()), line)


def _said(comments: Sequence[str], what: str) -> str:
    """The value of a comment 'what: value'."""
    value: Optional[str] = next(
        (comment.partition(': ')[2] for comment in comments
         if comment.startswith(f'{what}: ')), None)
    if value is None:
        raise UserError(f'the CSV file does not say the {what}')
    return value


def run(args: argparse.Namespace) -> int:
    """All of it; returns the exit status."""
    if not shutil.which('gnuplot'):
        raise UserError("there is no gnuplot: install it, in Debian "
                        "gnuplot-nox, or run 'make plot'")
    if not os.access(args.directory, os.W_OK | os.X_OK):
        raise UserError(f'cannot write to {args.directory}')
    plotter = Plotter(args)
    if not args.draw:
        ready(args)
        plotter.measure_rss()
        plotter.measure_times()
    plotter.draw()
    return 0


if __name__ == '__main__':
    sys.exit(run_main('plot', lambda: run(parse_args())))
