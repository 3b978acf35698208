# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a monitor of QEMU's keeps silent."""

import json
import socket
import threading
import time
from io import BufferedRWPair

# Seconds between an answer and the next question.  The CPU time that the
# answers take counts as QEMU's: below one percent.
_INTERVAL = 0.005


class Pinger:
    """Asks a QMP monitor that nobody else uses, again and again.

    Not by QEMU's package, whose event loop would be a part of what is measured.
    A context manager; leaving it waits for the last answer.

    longest: seconds from a question to its answer, so far.  A silence can have
    begun up to _INTERVAL before the question.
    """

    def __init__(self, path: str):
        """path: the monitor's socket, on which QEMU listens"""
        self.longest = 0.0
        self._stop = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> 'Pinger':
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            with self._socket.makefile('rwb') as file:
                file.readline()         # the greeting
                self._ask(file, 'qmp_capabilities')
                while not self._stop.wait(_INTERVAL):
                    asked = time.monotonic()
                    self._ask(file, 'query-status')
                    self.longest = max(self.longest, time.monotonic() - asked)
        except OSError:     # the guest was killed, and somebody else says why
            pass

    @staticmethod
    def _ask(file: BufferedRWPair, command: str) -> None:
        file.write(json.dumps({'execute': command}).encode() + b'\n')
        file.flush()
        while True:
            line = file.readline()
            if not line:
                raise ConnectionError('QEMU is gone')
            if 'return' in json.loads(line):
                return
