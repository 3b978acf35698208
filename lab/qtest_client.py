# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's test protocol: reads and writes memory as a guest would."""

import base64
import socket
from typing import List, Sequence

from lab.qemu import GuestError

# So many commands are sent before their answers are read
_BATCH = 256


class Qtest:
    """A connection to a QEMU; what is written gets into the dirty bitmap.

    A context manager: connects on entry, to a QEMU that has been started.
    """

    def __init__(self, path: str, timeout: float = 120.0):
        """path: of a socket; timeout: seconds for an answer."""
        self.arguments = ('-qtest', f'unix:{path},server=on,wait=off',
                          '-qtest-log', 'none')
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._file = self._socket.makefile('rwb')

    def __enter__(self) -> 'Qtest':
        self._socket.connect(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def commands(self, lines: Sequence[str]) -> List[str]:
        """Give commands; returns the last words of the answers."""
        answers = []
        for first in range(0, len(lines), _BATCH):
            batch = lines[first:first + _BATCH]
            self._file.write(''.join(f'{line}\n' for line in batch).encode())
            self._file.flush()
            for line in batch:
                answer = self._file.readline().decode().split()
                if not answer or answer[0] != 'OK':
                    raise GuestError(f'qtest: {line[:40]}: {" ".join(answer)}')
                answers.append(answer[-1])
        return answers

    def write(self, address: int, data: bytes) -> None:
        """As if a CPU had stored it."""
        if data.count(data[0]) == len(data):
            line = f'memset {address:#x} {len(data):#x} {data[0]:#x}'
        else:
            line = (f'b64write {address:#x} {len(data):#x} '
                    + base64.b64encode(data).decode())
        self.commands([line])

    def read(self, address: int, length: int) -> bytes:
        """As if a CPU had loaded it."""
        return bytes.fromhex(self.commands([f'read {address:#x} {length:#x}'])[0][2:])
