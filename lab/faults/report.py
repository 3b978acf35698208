# SPDX-License-Identifier: GPL-2.0-or-later
"""What came of many cases, as text."""

from collections import Counter
from typing import List

from lab.faults.run import Result
from lab.measure.report import rst_table


def details(result: Result) -> str:
    """What came of a case, and all that is known about it if it has failed."""
    if not result.complaint:
        return f'{result.outcome or "skipped"}: {result.case.describe()}'
    lines = [f'seed {result.case.seed}', f'  {result.complaint}',
             f'  {result.case.describe()}']
    for who, log in result.logs.items():
        lines += [f'  {who}:'] + [f'    {line}' for line
                                  in log.strip().splitlines()[-200:]]
    return '\n'.join(lines)


def summary(results: List[Result]) -> str:
    """What happened, and what came of it."""
    ran = [result for result in results if not result.skipped]
    outcomes = Counter(
        (result.case.fault,
         result.outcome + ('' if result.happened else ' (nothing happened)'))
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
    lines += ['', f'{sum(result.peeks for result in ran)} accesses during postcopy']
    return '\n'.join(lines)
