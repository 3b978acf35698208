# SPDX-License-Identifier: GPL-2.0-or-later
"""Run test programs that speak TAP, and count what they really did.

A test counts as passed only if the program said so.  One that crashed, hung,
or was announced and never reported counts as failed.
"""

import os
import re
import selectors
import signal
import subprocess
import time
from typing import Callable, Dict, IO, Iterator, List, Optional, Sequence

from lab.outcome import FAILED, PASSED, SKIPPED, Outcome, ending

# Seconds without a sign of life: a live guest under TCG on a busy machine
# needs a minute, a memory hog of a test on a slow one two.
TIMEOUT = 300

RESULT = re.compile(r'(?P<bad>not )?ok\b\s*(?P<number>\d+)?\s*(?:- )?'
                    r'(?P<name>[^#]*?)\s*(?:#\s*(?P<directive>.*))?$')
DIRECTIVE = re.compile(r'(skip|todo)\S*\s*(.*)', re.IGNORECASE)
# What a test program says can be behind what a QEMU has begun to say, which it
# writes in pieces and to the same file
BEHIND = re.compile(r'(?:(?:not )?ok \d+ /|Bail out!|1\.\.\d+$).*')
PLAN = re.compile(r'1\.\.(\d+)\s*(?:#\s*(?:skip\S*\s*)?(.*))?$', re.IGNORECASE)


class Parser:
    """Takes TAP line by line, keeps the outcomes by name."""

    def __init__(self) -> None:
        self.outcomes: Dict[str, Outcome] = {}
        self.plan: Optional[int] = None
        self.complaint = ''
        self.bailed_out = False
        self._since = time.monotonic()

    def feed(self, line: str) -> Optional[Outcome]:
        """Returns the outcome that the line tells, if it does."""
        line = line.rstrip()
        if not line.startswith(('#', ' ')):
            behind = BEHIND.search(line)
            line = behind[0] if behind else line
        plan = PLAN.match(line)
        if plan:
            self.plan = int(plan[1])
            self.complaint = plan[2] or self.complaint
            return None
        if line.startswith('Bail out!'):
            self.bailed_out = True
            self._complain(line[len('Bail out!'):])
            return None
        if line.startswith('# ') and 'ERROR' in line:
            self._complain(line[2:])
        elif line.startswith('#') or line.startswith(' '):
            return None
        return self._result(line)

    def _complain(self, text: str) -> None:
        # The first one says what happened, the rest what came of it.
        self.complaint = self.complaint or text.strip()

    def _result(self, line: str) -> Optional[Outcome]:
        match = RESULT.match(line)
        if not match:
            return None
        name = match['name'] or f'test {match["number"] or len(self.outcomes) + 1}'
        status, reason = (FAILED if match['bad'] else PASSED), ''
        directive = DIRECTIVE.match(match['directive'] or '')
        if directive and directive[1].lower() == 'skip':
            status, reason = SKIPPED, directive[2] or 'no reason given'
        elif status == FAILED:
            # glib: "not ok 2 /path - ERROR:file.c:1:function: assertion failed"
            name, _, reason = name.partition(' - ')
            reason = reason or self.complaint
        now = time.monotonic()
        outcome = Outcome(name, status, reason, now - self._since, True)
        self._since = now
        if name in self.outcomes and self.outcomes[name].status == FAILED:
            return None
        self.outcomes[name] = outcome
        return outcome


def lines_of(stream: IO[bytes], timeout: float) -> Iterator[str]:
    """The lines of a pipe; TimeoutError if none comes for that long."""
    buffer = b''
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout):
                raise TimeoutError
            data = os.read(stream.fileno(), 65536)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b'\n')
            for line in lines:
                yield line.decode(errors='replace')
    if buffer:
        yield buffer.decode(errors='replace')


def run(command: Sequence[str], log: IO[str], timeout: float = TIMEOUT,
        expected: Sequence[str] = (), cwd: Optional[str] = None,
        env: Optional[Dict[str, str]] = None,
        progress: Callable[[str], None] = lambda name: None) -> List[Outcome]:
    """Runs one TAP program to its end.

    @timeout: seconds without a line of output after which it counts as hung
    @expected: names of the tests that must be reported, if known
    @progress: called with the name of each test that is done

    Returns at least one outcome.  If the program ends before it has reported
    all of its tests, the one that it was at has failed; with @expected the
    caller finds those after it missing from the list.
    """
    parser = Parser()
    program = os.path.basename(command[0])
    log.write(f'$ {" ".join(command)}\n')
    began = time.monotonic()
    trouble = ''
    with subprocess.Popen(command, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          cwd=cwd, env=env, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            for line in lines_of(process.stdout, timeout):
                log.write(line + '\n')
                outcome = parser.feed(line)
                if outcome:
                    progress(outcome.name)
        except TimeoutError:
            trouble = f'no sign of life for {timeout:.0f} s'
        finally:
            # Also what a crashed program has left running.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            except PermissionError:
                process.kill()
    if not trouble and process.returncode:
        trouble = ending(process.returncode)
    log.flush()

    outcomes = list(parser.outcomes.values())
    missing = [name for name in expected if name not in parser.outcomes]
    unreported = (parser.plan or 0) - len(outcomes) if not expected else 0
    if any(outcome.status == FAILED for outcome in outcomes) and trouble:
        # glib reports a failed assertion, and then dies of it.
        if unreported > 0:
            outcomes.append(Outcome(program, FAILED, f'{unreported} tests after'
                                    f' the failed one were not run'))
    elif trouble or missing or unreported > 0 or not outcomes:
        if parser.plan == 0 and not trouble and not missing:
            return [Outcome(program, SKIPPED,
                            parser.complaint or 'the program has no test')]
        why = '; '.join(text for text in (parser.complaint, trouble) if text)
        if parser.bailed_out and parser.complaint:
            why = parser.complaint
        outcomes.append(Outcome(missing[0] if missing else program, FAILED,
                                why or 'not all tests were reported',
                                time.monotonic() - began))
    return outcomes
