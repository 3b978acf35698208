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

Metric = Callable[[Measurement], Optional[float]]


def _of_destination(field_name: str) -> Metric:
    return lambda m: (getattr(m.destination, field_name)
                      if m.destination else None)


def _cpu_time(measurement: Measurement) -> float:
    """Of both sides."""
    sides = measurement.source, measurement.destination
    return sum(side.cpu for side in sides if side)


# Sizes in bytes, times in seconds, None where there is nothing to measure
METRICS: Dict[str, Metric] = {
    'source_growth': lambda m: m.source.ram,
    'destination_growth': _of_destination('ram'),
    'source_page_tables': lambda m: m.source.page_tables,
    'destination_page_tables': _of_destination('page_tables'),
    'source_rss_peak': lambda m: m.source.rss_peak,
    'destination_rss_peak': _of_destination('rss_peak'),
    'total_time': lambda m: m.times.total,
    'wall_time': lambda m: m.times.wall,
    'load_time': lambda m: m.times.load,
    'downtime': lambda m: m.times.downtime,
    'cpu_time': _cpu_time,
    'source_cpu': lambda m: m.source.cpu,
    'destination_cpu': _of_destination('cpu'),
    'source_silence': lambda m: m.source.silence,
    'destination_silence': _of_destination('silence'),
    'expected_holes': lambda m: m.expected_holes,
    'holes': lambda m: m.holes}

_TIMES = ('total_time', 'wall_time', 'load_time', 'downtime', 'cpu_time',
          'source_cpu', 'destination_cpu')

_NAMES = {'source_growth': 'source growth',
          'destination_growth': 'destination growth',
          'source_page_tables': 'source page tables',
          'destination_page_tables': 'destination page tables',
          'source_rss_peak': 'source RSS, highest',
          'destination_rss_peak': 'destination RSS, highest',
          'total_time': 'total time',
          'load_time': 'load',
          'downtime': 'downtime',
          'cpu_time': 'CPU',
          'destination_cpu': 'destination CPU'}

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
    return (ordered[left_out], ordered[count - 1 - left_out],
            confidence(left_out))


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
        values = (METRICS[metric](run) for run in self.runs.get(label, ()))
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
        pairs = zip(*([METRICS[metric](run)
                       for run in self.runs.get(variant.label, ())]
                      for variant in self.row.variants))
        ratios = [pair[1] / pair[0] for pair in pairs
                  if len(pair) == 2 and pair[0] and pair[1] is not None]
        if not ratios:
            return None
        return PairedRatio(statistics.median(ratios),
                           *median_interval(ratios))

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
    compared = ' over '.join(variant.label
                             for variant in result.row.variants[::-1])
    if isinstance(target, AtMost):
        is_time = target.metric in _TIMES
        limit = (f'{target.limit:g} s' if is_time
                 else format_size(int(target.limit)))
        text = (f'{_NAMES[target.metric]} {"<" if target.strict else "<="} '
                f'{limit}')
        value = result.median(result.row.subject.label, target.metric)
        measured = f'{_seconds(value)} s' if is_time else f'{_mib(value)} MiB'
        met = value is not None and (value < target.limit or
                                     value == target.limit
                                     and not target.strict)
    elif isinstance(target, RatioAtMost):
        text = f'{_NAMES[target.metric]}, {compared} <= {target.limit:.2f}'
        value = result.ratio(target.metric)
        measured = _ratio(value)
        met = value is not None and value <= target.limit
    elif isinstance(target, PairedRatioAtMost):
        text = f'{_NAMES[target.metric]}, {compared} <= {target.limit:.2f}'
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

def _mib(value: Optional[float]) -> str:
    return NOTHING if value is None else f'{value / MIB:.1f}'


def _seconds(value: Optional[float]) -> str:
    return NOTHING if value is None else f'{value:.3f}'


def _ratio(value: Optional[float]) -> str:
    return NOTHING if value is None else f'{value:.3f}'


def _paired(value: Optional[PairedRatio]) -> str:
    if value is None:
        return NOTHING
    if not value.confidence:
        return f'{value.median:.3f} (of one pair)'
    return (f'{value.median:.3f} ({value.low:.3f} to {value.high:.3f}, '
            f'{value.confidence * 100:.0f} %)')


def _percent(value: Optional[float]) -> str:
    return NOTHING if value is None else f'{value * 100:.1f} %'


def _holes(result: RowResult, label: str) -> str:
    """What query-migrate told of what there was, of the worst run."""
    runs = [run for run in result.runs.get(label, ())
            if run.times.ram and run.expected_holes is not None]
    if not runs:
        return NOTHING
    if any(run.holes is None for run in runs):
        return 'absent'
    worst = max(runs, key=lambda run: abs((run.holes or 0) -
                                          (run.expected_holes or 0)))
    return f'{worst.holes} of {worst.expected_holes}'


def growth_table(results: Sequence[RowResult]) -> str:
    """Two lines a row, of the rows in which RAM grows."""
    header = ('row', 'guest RAM', 'QEMU', 'source, MiB', 'dest., MiB',
              'source PTE, MiB', 'dest. PTE, MiB', 'source RSS, MiB',
              'dest. RSS, MiB', 'total, s', 'load, s', 'holes', 'runs')
    return rst_table(header, [_growth_line(result, variant)
                              for result in results
                              for variant in result.row.variants])


def _growth_line(result: RowResult, variant: Variant) -> List[str]:
    label = variant.label

    def median(metric: str) -> Optional[float]:
        return result.median(label, metric)

    return [result.row.name, format_size(result.size_of(variant)), label,
            _mib(median('source_growth')),
            _mib(median('destination_growth')),
            _mib(median('source_page_tables')),
            _mib(median('destination_page_tables')),
            _mib(median('source_rss_peak')),
            _mib(median('destination_rss_peak')),
            _seconds(median('total_time')), _seconds(median('load_time')),
            _holes(result, label), str(len(result.runs.get(label, ())))]


def speed_table(results: Sequence[RowResult]) -> str:
    """One line a row, of the rows about speed."""
    header = ('row', 'what', 'guest RAM', 'compared', 'total, s', 'ratio',
              'spread', 'CPU ratio', 'runs')
    return rst_table(header, [_speed_line(result) for result in results])


def _speed_line(result: RowResult) -> List[str]:
    baseline, subject = (variant.label for variant in result.row.variants)
    return [result.row.name, result.row.what, format_size(result.size),
            f'{subject} over {baseline}',
            f'{_seconds(result.median(subject, "total_time"))} / '
            f'{_seconds(result.median(baseline, "total_time"))}',
            _ratio(result.ratio('total_time')),
            _percent(result.spread('total_time')),
            _ratio(result.ratio('cpu_time')),
            str(min(len(result.runs.get(label, ()))
                    for label in (baseline, subject)))]


def harmless_table(results: Sequence[RowResult]) -> str:
    """One line a row that has two variants; patched / stock in each cell."""
    header = ('row', 'what', 'guest RAM', 'total, s', 'source CPU, s',
              'dest. CPU, s', 'downtime, ms', 'load, ms', 'source, MiB',
              'dest., MiB', 'source silent, ms', 'dest. silent, ms', 'runs')
    return rst_table(header, [_harmless_line(result) for result in results])


def _milliseconds(digits: int) -> Callable[[Optional[float]], str]:
    return lambda value: (NOTHING if value is None
                          else f'{value * 1000:.{digits}f}')


def _harmless_line(result: RowResult) -> List[str]:
    labels = [variant.label for variant in result.row.variants[::-1]]

    def both(metric: str, text: Callable[[Optional[float]], str]) -> str:
        return ' / '.join(text(result.median(label, metric))
                          for label in labels)

    return [result.row.name, result.row.what, format_size(result.size),
            both('total_time', _seconds), both('source_cpu', _seconds),
            both('destination_cpu', _seconds),
            both('downtime', _milliseconds(2)),
            both('load_time', _milliseconds(1)),
            both('source_growth', _mib), both('destination_growth', _mib),
            both('source_silence', _milliseconds(1)),
            both('destination_silence', _milliseconds(1)),
            str(min(len(result.runs.get(label, ())) for label in labels))]


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
    """For JSON: every run, and what follows from them."""
    row = result.row
    verdicts: List[Tuple[Verdict, object]] = []
    if not result.skipped:
        verdicts = list(zip(judge(result), row.targets))
    return {
        'name': row.name, 'what': row.what, 'guest': row.guest,
        'operation': {'kind': type(row.operation).__name__,
                      **asdict(cast(Any, row.operation))},
        'fill': row.fill, 'size': result.size, 'wanted_size': result.wanted,
        'skipped': result.skipped, 'failures': result.failures,
        'baseline': row.baseline and asdict(row.baseline),
        'subject': asdict(row.subject),
        'runs': {label: [{**asdict(run),
                          'metrics': {name: metric(run)
                                      for name, metric in METRICS.items()}}
                         for run in runs]
                 for label, runs in result.runs.items()},
        'medians': {label: {name: result.median(label, name)
                            for name in METRICS} for label in result.runs},
        'ratios': {name: result.ratio(name) for name in _TIMES},
        'paired_ratios': {name: paired and paired._asdict()
                          for name, paired in ((name, result.paired(name))
                                               for name in _TIMES)},
        'spreads': {name: result.spread(name) for name in _TIMES},
        'targets': [{'kind': type(target).__name__, **vars(target),
                     'target': verdict.target, 'measured': verdict.measured,
                     'met': verdict.met} for verdict, target in verdicts]}
