# SPDX-License-Identifier: GPL-2.0-or-later
"""What came of many cases, as text."""

from collections import Counter
from typing import List

from lab.faults.run import Result
from lab.measure.report import rst_table


def failure(result: Result, name: str = '') -> str:
    """All that is known about a case that failed."""
    lines = [f'FAILED seed {result.case.seed} {name}'.rstrip(),
             f'  {result.complaint}',
             f'  {result.case.describe()}']
    for who, log in result.logs.items():
        lines += [f'  {who}:'] + [f'    {line}' for line
                                  in log.strip().splitlines()[-200:]]
    return '\n'.join(lines)


def summary(results: List[Result], seconds: float) -> str:
    """Of all cases: what happened, what came of it."""
    ran = [result for result in results if not result.skipped]
    outcomes = Counter((result.case.fault, result.outcome
                        if result.happened else f'{result.outcome} (nothing '
                        'happened)')
                       for result in ran if not result.complaint)
    calls: Counter[str] = Counter()
    for result in ran:
        calls += result.failed_calls
    lines = [rst_table(('fault', 'outcome', 'cases'),
                       [(fault, outcome, str(count)) for (fault, outcome), count
                        in sorted(outcomes.items())])]
    if calls:
        lines += ['', rst_table(('call that failed', 'times'),
                                [(call, str(count)) for call, count
                                 in sorted(calls.items())])]
    skipped = Counter(result.skipped for result in results if result.skipped)
    lines += ['', *(f'{count} skipped: {reason}' for reason, count
                    in skipped.items())]
    failed = [result for result in results if result.complaint]
    lines += [f'{sum(result.peeks for result in ran)} accesses during '
              'postcopy',
              f'{len(ran) - len(failed)} passed, {len(failed)} failed, '
              f'{len(results) - len(ran)} skipped, in {seconds:.0f} s '
              f'({len(ran) / seconds * 3600:.0f} cases an hour)']
    if failed:
        lines += ['failed seeds: ' + ' '.join(str(result.case.seed)
                                              for result in failed)]
    return '\n'.join(lines)
