# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP, as much of it as is needed."""

import json
import socket
import time
from typing import Any, Callable, Dict

from .common import Failure


class Qmp:
    """A monitor."""

    def __init__(self, path: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(timeout)
                self._socket.connect(path)
                break
            except OSError as err:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise Failure(f'{path}: {err}') from err
                time.sleep(0.05)
        self._lines = self._socket.makefile('r', encoding='utf-8')
        self._lines.readline()
        self('qmp_capabilities')

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Execute a command; events are ignored."""
        request: Dict[str, Any] = {'execute': command}
        if arguments:
            request['arguments'] = {name.replace('_', '-'): value
                                    for name, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps(request).encode())
            while True:
                line = self._lines.readline()
                if not line:
                    raise Failure(f'QEMU has ended during {command}')
                answer = json.loads(line)
                if 'error' in answer:
                    raise Failure(f'{command}: {answer["error"]["desc"]}')
                if 'return' in answer:
                    return answer['return']
        except OSError as err:
            raise Failure(f'{command}: {err}') from err

    def wait(self, what: str, condition: Callable[[], bool],
             timeout: float) -> None:
        """Until a condition is met."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise Failure(f'{what} has not come within {timeout:.0f} '
                              'seconds')
            time.sleep(0.02)

    def close(self) -> None:
        """End it."""
        self._lines.close()
        self._socket.close()
