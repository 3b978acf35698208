# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the unit tests of a module, reporting in TAP."""

import sys
import traceback
import unittest
from types import TracebackType
from typing import Optional, Tuple, Type, Union

from lab.outcome import FAILED, PASSED, SKIPPED, Outcome

_Error = Union[Tuple[Type[BaseException], BaseException, TracebackType],
               Tuple[None, None, None]]


class TapResult(unittest.TestResult):
    """Prints a line for each test."""

    def __init__(self) -> None:
        super().__init__()
        self._subtests_failed = False

    def _line(self, status: str, test: unittest.TestCase, reason: str = '',
              details: str = '') -> None:
        print(Outcome(test.id().removeprefix(f'{sys.argv[1]}.'), status,
                      reason).tap(self.testsRun, details), flush=True)

    def startTest(self, test: unittest.TestCase) -> None:
        self._subtests_failed = False
        super().startTest(test)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase,
                   err: Optional[_Error]) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._subtests_failed = True
            self._bad(test, err)

    def addSuccess(self, test: unittest.TestCase) -> None:
        if not self._subtests_failed:
            self._line(PASSED, test)

    def _bad(self, test: unittest.TestCase, err: _Error) -> None:
        self._line(FAILED, test, repr(err[1]),
                   ''.join(traceback.format_exception(err[1])))

    def addError(self, test: unittest.TestCase, err: _Error) -> None:
        super().addError(test, err)
        self._bad(test, err)

    def addFailure(self, test: unittest.TestCase, err: _Error) -> None:
        super().addFailure(test, err)
        self._bad(test, err)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._line(SKIPPED, test, reason)


def main() -> int:
    """Runs the tests of the module that is named on the command line."""
    suite = unittest.defaultTestLoader.loadTestsFromName(sys.argv[1])
    print(f'1..{suite.countTestCases()}')
    result = TapResult()
    suite.run(result)
    return 0 if result.wasSuccessful() else 1


if __name__ == '__main__':
    sys.exit(main())
