# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements of the benchmark as medians, tables and verdicts."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Sequence,
                    Tuple, cast)

from lab.measure.operation import Measurement
from lab.measure.report import rst_table
from lab.measure.rows import (AtMost, HolesAreRight, PairedRatioAtMost,
                              RatioAtMost, Row, Variant)
from lab.memory import MIB, format_size


@dataclass(frozen=True)
class Metric:
    """A figure of a measurement.

    title: in a target.  is_time: in seconds, and not in bytes or pages.
    of: the measurement; None where there is nothing to measure.
    """
    title: str
    is_time: bool
    of: Callable[[Measurement], Optional[float]]


def _attribute(where: str, name: str) -> Callable[[Measurement], Optional[float]]:
    """Of what a measurement may not have, such as the destination."""
    return lambda run: getattr(getattr(run, where), name, None)


def _cpu_time(measurement: Measurement) -> float:
    """Of both sides."""
    sides = measurement.source, measurement.destination
    return sum(side.cpu for side in sides if side)


def _sides(name: str, title: str, is_time: bool, attribute: str) -> Dict[str, Metric]:
    """The same figure of the source and of the destination."""
    return {f'{side}_{name}': Metric(f'{side} {title}', is_time,
                                     _attribute(side, attribute))
            for side in ('source', 'destination')}


METRICS: Dict[str, Metric] = {
    **_sides('growth', 'growth', False, 'ram'),
    **_sides('page_tables', 'page tables', False, 'page_tables'),
    **_sides('rss_peak', 'RSS, highest', False, 'rss_peak'),
    **_sides('cpu', 'CPU', True, 'cpu'),
    **_sides('silence', 'silence', True, 'silence'),
    'total_time': Metric('total time', True, _attribute('times', 'total')),
    'load_time': Metric('load', True, _attribute('times', 'load')),
    'downtime': Metric('downtime', True, _attribute('times', 'downtime')),
    'cpu_time': Metric('CPU', True, _cpu_time),
    'expected_holes': Metric('expected holes', False, lambda m: m.expected_holes)}

# Not '-', which is a list in reStructuredText
NOTHING = 'n/a'

# How sure a confidence interval shall be, if there are enough runs for that
_CONFIDENCE = 0.95


class PairedRatio(NamedTuple):
    """The median of ratios, and between which values it is with what
    confidence (as part of 1).
    """
    median: float
    low: float
    high: float
    confidence: float


def median_interval(values: Sequence[float]) -> Tuple[float, float, float]:
    """A confidence interval of the median: low, high, and the confidence.

    It begins and ends at one of the values, and supposes nothing of how they
    are distributed: each is as likely above the true median as below it.  With
    less than six values it is all they span, and the confidence is less than
    _CONFIDENCE.
    """
    ordered = sorted(values)
    count = len(ordered)

    def confidence(left_out: int) -> float:
        """Of what is between so many values at each end."""
        outside = sum(math.comb(count, each) for each in range(left_out + 1))
        return max(0.0, 1 - 2 * outside / 2 ** count)

    left_out = max((each for each in range((count + 1) // 2)
                    if confidence(each) >= _CONFIDENCE), default=0)
    return (ordered[left_out], ordered[count - 1 - left_out], confidence(left_out))


@dataclass
class RowResult:
    """All that was measured of a row.

    size: bytes of guest RAM, but see size_of(); wanted: those that it should
    have had.
    runs: by the variant's label, in the order in which they were done.
    failures: by label, what went wrong with that variant.
    skipped: why nothing was measured.
    """
    row: Row
    size: int
    wanted: int
    runs: Dict[str, List[Measurement]] = field(default_factory=dict)
    failures: Dict[str, str] = field(default_factory=dict)
    skipped: Optional[str] = None

    def size_of(self, variant: Variant) -> int:
        """Bytes of guest RAM."""
        return variant.size or self.size

    def values(self, label: str, metric: str) -> List[float]:
        """One value a run."""
        values = (METRICS[metric].of(run) for run in self.runs.get(label, ()))
        return [value for value in values if value is not None]

    def median(self, label: str, metric: str) -> Optional[float]:
        """None if there is no value."""
        values = self.values(label, metric)
        return statistics.median(values) if values else None

    def ratio(self, metric: str) -> Optional[float]:
        """The subject's median over the baseline's, None if there is none."""
        if not self.row.baseline:
            return None
        baseline = self.median(self.row.baseline.label, metric)
        subject = self.median(self.row.subject.label, metric)
        return subject / baseline if baseline and subject is not None else None

    def paired(self, metric: str) -> Optional[PairedRatio]:
        """The subject over the baseline, of runs that followed each other.

        What changes slowly on the machine is the same for both.
        """
        pairs = zip(*([METRICS[metric].of(run)
                       for run in self.runs.get(variant.label, ())]
                      for variant in self.row.variants))
        ratios = [pair[1] / pair[0] for pair in pairs
                  if len(pair) == 2 and pair[0] and pair[1] is not None]
        if not ratios:
            return None
        return PairedRatio(statistics.median(ratios), *median_interval(ratios))

    def spread(self, metric: str) -> Optional[float]:
        """The larger interquartile range of the two, as part of the median.

        How far a ratio is to be trusted.  None with less than two runs.
        """
        return max((spread for spread in
                    (_spread(self.values(variant.label, metric))
                     for variant in self.row.variants)
                    if spread is not None), default=None)


def _spread(values: Sequence[float]) -> Optional[float]:
    if len(values) < 2 or not statistics.median(values):
        return None
    quartiles = statistics.quantiles(values, n=4, method='inclusive')
    return (quartiles[2] - quartiles[0]) / statistics.median(values)


# Verdicts

@dataclass(frozen=True)
class Verdict:
    """A target, and whether it was reached.

    size: bytes of guest RAM.
    met: None if it was not measured, or if the noise does not let it be known.
    """
    row: str
    size: int
    target: str
    measured: str
    met: Optional[bool]

    @property
    def word(self) -> str:
        """For people."""
        if self.met is None:
            return 'not measured' if self.measured == NOTHING else 'undecided'
        return 'met' if self.met else 'missed'


def judge(result: RowResult) -> List[Verdict]:
    """One verdict for every target of the row."""
    return [_judge(result, target) for target in result.row.targets]


def _judge(result: RowResult, target: object) -> Verdict:
    met: Optional[bool]
    text = measured = ''
    if isinstance(target, (RatioAtMost, PairedRatioAtMost)):
        compared = ' over '.join(variant.label for variant in result.row.variants[::-1])
        text = f'{METRICS[target.metric].title}, {compared} <= {target.limit:.2f}'
    if isinstance(target, AtMost):
        metric = METRICS[target.metric]
        value = result.median(result.row.subject.label, target.metric)
        sign = '<' if target.strict else '<='
        if metric.is_time:
            text = f'{metric.title} {sign} {target.limit:g} s'
            measured = f'{_seconds(value)} s'
        else:
            text = f'{metric.title} {sign} {format_size(int(target.limit))}'
            measured = f'{_mib(value)} MiB'
        met = value is not None and (value < target.limit or
                                     value == target.limit
                                     and not target.strict)
    elif isinstance(target, RatioAtMost):
        value = result.ratio(target.metric)
        measured = _ratio(value)
        met = value is not None and value <= target.limit
    elif isinstance(target, PairedRatioAtMost):
        paired = result.paired(target.metric)
        value = paired and paired.median
        measured = _paired(paired)
        met = None
        if paired and paired.confidence:
            met = (True if paired.median <= target.limit else
                   False if paired.low > target.limit else None)
    elif isinstance(target, HolesAreRight):
        text = 'holes = the holes there were'
        label = result.row.subject.label
        value = result.median(label, 'expected_holes')
        measured = _holes(result, label)
        met = value is not None and all(
            run.holes == run.expected_holes for run in result.runs[label])
    else:
        raise TypeError(target)
    if value is None:
        measured, met = NOTHING, None
    return Verdict(result.row.name, result.size_of(result.row.subject), text,
                   measured, met)


# Text

Text = Callable[[Optional[float]], str]


def _number(digits: int, unit: float = 1, suffix: str = '') -> Text:
    """How a figure is written, in this unit."""
    return lambda value: (NOTHING if value is None
                          else f'{value / unit:.{digits}f}{suffix}')


_mib = _number(1, MIB)
_seconds = _ratio = _number(3)
_percent = _number(1, 0.01, ' %')


def _paired(value: Optional[PairedRatio]) -> str:
    if value is None:
        return NOTHING
    if not value.confidence:
        return f'{value.median:.3f} (of one pair)'
    return (f'{value.median:.3f} ({value.low:.3f} to {value.high:.3f}, '
            f'{value.confidence * 100:.0f} %)')


def _holes(result: RowResult, label: str) -> str:
    """What query-migrate told of what there was, of the worst run."""
    runs = [run for run in result.runs.get(label, ())
            if run.times.ram and run.expected_holes is not None]
    if not runs:
        return NOTHING
    if any(run.holes is None for run in runs):
        return 'absent'
    worst = max(runs, key=lambda run: abs((run.holes or 0) - (run.expected_holes or 0)))
    return f'{worst.holes} of {worst.expected_holes}'


def _runs(result: RowResult, *labels: str) -> str:
    return str(min(len(result.runs.get(label, ())) for label in labels))


# Columns: a title, a metric, and how it is written
_Columns = Sequence[Tuple[str, str, Text]]

_GROWTH: _Columns = (
    ('source, MiB', 'source_growth', _mib),
    ('dest., MiB', 'destination_growth', _mib),
    ('source PTE, MiB', 'source_page_tables', _mib),
    ('dest. PTE, MiB', 'destination_page_tables', _mib),
    ('source RSS, MiB', 'source_rss_peak', _mib),
    ('dest. RSS, MiB', 'destination_rss_peak', _mib),
    ('total, s', 'total_time', _seconds),
    ('load, s', 'load_time', _seconds))


def growth_table(results: Sequence[RowResult]) -> str:
    """Two lines a row, of the rows in which RAM grows."""
    return rst_table(
        ('row', 'guest RAM', 'QEMU', *(title for title, *_ in _GROWTH), 'holes',
         'runs'),
        [[result.row.name, format_size(result.size_of(variant)), variant.label,
          *(text(result.median(variant.label, metric))
            for _, metric, text in _GROWTH),
          _holes(result, variant.label), _runs(result, variant.label)]
         for result in results for variant in result.row.variants])


def speed_table(results: Sequence[RowResult]) -> str:
    """One line a row, of the rows about speed."""
    header = ('row', 'what', 'guest RAM', 'compared', 'total, s', 'ratio',
              'spread', 'CPU ratio', 'runs')
    return rst_table(header, [_speed_line(result) for result in results])


def _speed_line(result: RowResult) -> List[str]:
    labels = [variant.label for variant in result.row.variants[::-1]]
    return [result.row.name, result.row.what, format_size(result.size),
            ' over '.join(labels),
            ' / '.join(_seconds(result.median(label, 'total_time'))
                       for label in labels),
            _ratio(result.ratio('total_time')),
            _percent(result.spread('total_time')),
            _ratio(result.ratio('cpu_time')), _runs(result, *labels)]


_HARMLESS: _Columns = (
    ('total, s', 'total_time', _seconds),
    ('source CPU, s', 'source_cpu', _seconds),
    ('dest. CPU, s', 'destination_cpu', _seconds),
    ('downtime, ms', 'downtime', _number(2, 0.001)),
    ('load, ms', 'load_time', _number(1, 0.001)),
    ('source, MiB', 'source_growth', _mib),
    ('dest., MiB', 'destination_growth', _mib),
    ('source silent, ms', 'source_silence', _number(1, 0.001)),
    ('dest. silent, ms', 'destination_silence', _number(1, 0.001)))


def harmless_table(results: Sequence[RowResult]) -> str:
    """One line a row that has two variants; patched / stock in each cell."""
    return rst_table(
        ('row', 'what', 'guest RAM', *(title for title, *_ in _HARMLESS), 'runs'),
        [_harmless_line(result) for result in results])


def _harmless_line(result: RowResult) -> List[str]:
    labels = [variant.label for variant in result.row.variants[::-1]]
    return [result.row.name, result.row.what, format_size(result.size),
            *(' / '.join(text(result.median(label, metric)) for label in labels)
              for _, metric, text in _HARMLESS),
            _runs(result, *labels)]


def targets_table(verdicts: Sequence[Verdict]) -> str:
    """One line a target."""
    return rst_table(('row', 'guest RAM', 'target', 'measured', 'verdict'),
                     [(verdict.row, format_size(verdict.size), verdict.target,
                       verdict.measured, verdict.word)
                      for verdict in verdicts])


def notes(results: Sequence[RowResult]) -> List[str]:
    """What has to be known about the tables, one sentence each."""
    said = []
    for result in results:
        name = result.row.name
        if result.skipped:
            said.append(f'{name}: skipped, {result.skipped}.')
        elif (result.size < result.wanted
              and not all(variant.size for variant in result.row.variants)):
            said.append(f'{name}: {format_size(result.size)} instead of '
                        f'{format_size(result.wanted)}, {_smaller(result)}.')
        said += [f'{name}: {label} FAILED, {failure}'
                 for label, failure in result.failures.items()]
    return said


def _smaller(result: RowResult) -> str:
    if result.row.largest and result.size >= result.row.largest:
        return result.row.why
    return 'because no more fits this machine at the moment'


# JSON

def as_dict(result: RowResult) -> Dict[str, Any]:
    """For JSON: every run, and what became of the targets."""
    row = result.row
    verdicts = [] if result.skipped else judge(result)
    return {
        'name': row.name, 'what': row.what, 'guest': row.guest,
        'operation': {'kind': type(row.operation).__name__,
                      **asdict(cast(Any, row.operation))},
        'fill': row.fill, 'size': result.size, 'wanted_size': result.wanted,
        'skipped': result.skipped, 'failures': result.failures,
        'baseline': row.baseline and asdict(row.baseline),
        'subject': asdict(row.subject),
        'runs': {label: [asdict(run) for run in runs]
                 for label, runs in result.runs.items()},
        'targets': [{'target': verdict.target, 'measured': verdict.measured,
                     'met': verdict.met} for verdict in verdicts]}
