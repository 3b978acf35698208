# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU's sanitizers have reported, and whose it is.

A report is ours if it happened in a line that the patches have changed, or if
a function of this project's files takes part in it, however far out.  All others
must be listed, in lab/ci/*.supp: then a QEMU without the patches gives them,
too.  A race that is listed with both functions is excused also where it is ours: it
is the same race as that of QEMU, in a line that was changed, or because a function
of ours does what QEMU's do.  The lists are not given to the sanitizers: there, what
is meant for QEMU would hide what is ours.
"""

import fnmatch
import glob
import os
import re
import subprocess
from dataclasses import dataclass
from typing import Dict, Iterator, List, Sequence, Set, Tuple

# "    #1 0x55d0 in function file.c:1:2 (qemu+0x1)", ThreadSanitizer has no "in"
_FRAME = re.compile(r'\s+#\d+ (?:0x[0-9a-f]+ )?(?:in )?(\S+) (\S+?)'
                    r'(?::(\d+))?(?::\d+)?(?: \(.*)?$')

# Which of the stacks of a report are of who has done something wrong; that of
# a thread's creation, for example, says nothing
_STACK_TITLES = re.compile(
    r'\s*(?:(?:Previous |Atomic |atomic )*(?:[Rr]ead|[Ww]rite) of size|'
    r'(?:READ|WRITE) of size|Previous (?:atomic )?(?:read|write)|'
    r'(?:In)?[Dd]irect leak of|.*runtime error:|=+\d*=*\s*ERROR:|'
    r'WARNING: ThreadSanitizer)')

_STARTS = (
    # ThreadSanitizer
    ('WARNING: ThreadSanitizer: ', re.compile(
        r'WARNING: ThreadSanitizer: ([^(]+?) \(pid')),
    # AddressSanitizer
    ('ERROR: AddressSanitizer', re.compile(
        r'ERROR: AddressSanitizer:? ([\w-]+)')),
    # LeakSanitizer
    (' leak of ', re.compile(r'(?:Ind|D)irect (leak) of')),
    # UndefinedBehaviorSanitizer
    ('runtime error: ', re.compile(r'runtime error: (.*)')))

# What a report is called in a list, by what it says
_KINDS = {'data race': 'race', 'leak': 'leak'}

Frame = Tuple[str, str, int]    # function, file, line (0 if unknown)


@dataclass
class Report:
    """One report.

    kind: as it is called in a list, or what the sanitizer says.
    stacks: innermost frame first.
    text: all lines.
    """
    kind: str
    stacks: List[List[Frame]]
    text: List[str]

    def tops(self) -> List[Frame]:
        """The innermost call of each stack, but for the sanitizer's own.

        Those stand in for functions of libraries, such as memcpy().
        """
        return [next((frame for frame in stack
                      if '/libsanitizer/' not in frame[1]), stack[0])
                for stack in self.stacks if stack]

    def frames(self) -> List[Frame]:
        """All calls."""
        return [frame for stack in self.stacks for frame in stack]

    @property
    def where(self) -> str:
        """For people, and to tell reports apart: as it is listed."""
        functions = sorted({frame[0] for frame in self.tops()})
        return f'{self.kind}:{",".join(functions)}'


def _start_of(line: str) -> str:
    """What kind of report starts in this line, if one does."""
    for mark, expression in _STARTS:
        if mark in line:
            match = expression.search(line)
            if match:
                return _KINDS.get(match[1], match[1].strip())
    return ''


def parse(lines: Sequence[str]) -> Iterator[Report]:
    """The reports in a log."""
    report = None
    relevant = True
    for line in lines:
        kind = _start_of(line)
        if kind:
            if report:
                yield report
            report = Report(kind, [], [])
        if not report:
            continue
        report.text.append(line.rstrip())
        frame = _FRAME.match(line)
        if not frame:
            # What has no title goes on with a stack that has one
            if line.strip():
                relevant = bool(_STACK_TITLES.match(line) or kind)
                report.stacks.append([])
        elif relevant:
            report.stacks[-1].append((frame[1], frame[2], int(frame[3] or 0)))
    if report:
        yield report


def read_directory(directory: str) -> List[Report]:
    """The reports of all processes, which have a log each there."""
    reports: List[Report] = []
    for path in sorted(glob.glob(f'{directory}/*')):
        with open(path, encoding='utf-8', errors='replace') as file:
            for report in parse(file.readlines()):
                report.stacks = [stack for stack in report.stacks if stack]
                reports.append(report)
    return reports


class Ownership:
    """Which lines of the patched tree are this project's."""

    _HUNK = re.compile(r'@@ -\S+ \+(\d+)(?:,(\d+))? @@')

    def __init__(self, stock: str, patched: str):
        """The source trees."""
        self._stock, self._patched = stock, patched
        self._lines: Dict[str, Set[int]] = {}

    def _changed(self, path: str) -> Set[int]:
        """Lines of a file that differ; {0} for a file that is new."""
        old = os.path.join(self._stock, path)
        new = os.path.join(self._patched, path)
        if not os.path.exists(new):
            return set()
        if not os.path.exists(old):
            return {0}
        diff = subprocess.run(['diff', '-U0', old, new], check=False,
                              text=True, stdout=subprocess.PIPE).stdout
        lines: Set[int] = set()
        for start, count in self._HUNK.findall(diff):
            lines.update(range(int(start), int(start) + int(count or 1)))
        return lines

    def _lines_of(self, frame: Frame) -> Set[int]:
        # ../src/migration/ram.c
        path = os.path.normpath(frame[1]).rpartition('/src/')[2]
        path = re.sub(r'^(\.\./)*(src/)?', '', path)
        if path not in self._lines:
            self._lines[path] = self._changed(path)
        return self._lines[path]

    def has(self, report: Report) -> bool:
        """Whether a report is ours."""
        frames = report.frames()
        # Who has lost memory need not have called malloc() itself
        nearest = frames if report.kind == 'leak' else report.tops()
        return (any(frame[2] in self._lines_of(frame) for frame in nearest) or
                any(0 in self._lines_of(frame) for frame in frames))


class Listed:
    """Reports that are known: one a line as Report.where has it, comments after #.

    So a data race is listed by the functions of both sides.  Of a leak it is any
    function of the stack.  May be a pattern as the shell's for files.
    """

    def __init__(self, path: str):
        self.used: Set[str] = set()
        with open(path, encoding='utf-8') as file:
            entries = [line.partition('#')[0].strip() for line in file]
        self.entries = [entry for entry in entries if entry]

    def has_race(self, report: Report) -> bool:
        """Whether the report is a race whose functions are listed."""
        if report.kind != 'race' or report.where not in self.entries:
            return False
        self.used.add(report.where)
        return True

    def has(self, report: Report) -> bool:
        """Whether the report is listed."""
        names = [report.where]
        if report.kind == 'leak':
            names = [f'leak:{frame[0]}' for frame in report.frames()]
        for entry in self.entries:
            if fnmatch.filter(names, entry):
                self.used.add(entry)
                return True
        return False


@dataclass
class Verdict:
    """What there was to report, by where it is, with one example each."""
    ours: Dict[str, Report]
    unlisted: Dict[str, Report]
    listed: Dict[str, int]


def judge(reports: Sequence[Report], ownership: Ownership, known: Listed) -> Verdict:
    """Tell ours from QEMU's."""
    verdict = Verdict({}, {}, {})
    for report in reports:
        if ownership.has(report) and not known.has_race(report):
            verdict.ours.setdefault(report.where, report)
        elif known.has(report):
            verdict.listed[report.where] = verdict.listed.get(report.where, 0) + 1
        else:
            verdict.unlisted.setdefault(report.where, report)
    return verdict
