# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls of a QEMU that fail: the other side of fail-calls.c."""

import errno
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

from lab import UserError

# In the order of enum Call in fail-calls.c
CALLS = ('lseek', 'fallocate', 'fstat', 'cachestat', 'pread', 'madvise',
         'mincore', 'pagemap-open', 'pagemap-scan', 'pagemap-read',
         'uffd-copy')

# Not in Python's errno
_EHWPOISON = 133

# Of a Rule: each of the calls
ALWAYS = 1.0

_MAGIC = 0x6661696c
_RULES = 8
_HEADER = struct.Struct('=IIQQ')
_RULE = struct.Struct('=iiQQIIQQ')
_SIZE = _HEADER.size + _RULES * _RULE.size
_ARMED = 4              # offset
_ALWAYS = (1 << 32) - 1


@dataclass(frozen=True)
class Rule:
    """A call that fails.

    error: name of the errno.
    first: number of the first call that fails; count: how many do, from there
    on, 0 for all; chance: of each of those to fail, by seed.
    """
    call: str
    error: str
    first: int = 0
    count: int = 0
    chance: float = ALWAYS
    seed: int = 0

    @property
    def number(self) -> int:
        """The errno as a number."""
        return (_EHWPOISON if self.error == 'EHWPOISON' else getattr(errno, self.error))


def pack(rules: Sequence[Rule], device: int, inode: int) -> bytes:
    """What the library reads."""
    if len(rules) > _RULES:
        raise ValueError(f'{len(rules)} rules')
    packed = _HEADER.pack(_MAGIC, 0, device, inode)
    for rule in rules:
        packed += _RULE.pack(
            CALLS.index(rule.call), rule.number, rule.first, rule.count,
            min(_ALWAYS, round(rule.chance * (1 << 32))), rule.seed, 0, 0)
    return packed + _RULE.pack(-1, *[0] * 7) * (_RULES - len(rules))


def counts(packed: bytes) -> List[Tuple[int, int]]:
    """Of each rule, how many calls there were, and how many failed."""
    found = []
    for i in range(_RULES):
        *_, seen, failed = _RULE.unpack_from(packed, _HEADER.size + i * _RULE.size)
        found.append((int(seen), int(failed)))
    return found


class FailCalls:
    """The library in one QEMU.

    library: fail-calls.so.  directory: for the file that it maps.
    """

    def __init__(self, library: str, directory: str, name: str):
        if not os.access(library, os.R_OK):
            raise UserError(f"there is no {library}: run 'make rig' first")
        self._library = library
        self._path = os.path.join(directory, f'{name}-fail-calls')
        with open(self._path, 'w+b') as file:
            file.write(pack((), 0, 0))
            file.flush()
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._rules: List[Rule] = []

    def command(self, extra: Dict[str, str]) -> Sequence[str]:
        """What to put in front of QEMU's command line."""
        variables = {'LD_PRELOAD': self._library, 'FAIL_CALLS': self._path, **extra}
        return ('env', *(f'{name}={value}' for name, value in variables.items()))

    def arm(self, rules: Sequence[Rule], ram: str) -> None:
        """Let calls fail from now on.

        ram: path of the file that is guest RAM, '' if there is none.
        """
        status = os.stat(ram) if ram else None
        self._map[:] = pack(rules, status.st_dev if status else 0,
                            status.st_ino if status else 0)
        self._rules = list(rules)
        self._map[_ARMED:_ARMED + 4] = struct.pack('=I', 1)

    def disarm(self) -> None:
        """No call fails any more."""
        self._map[_ARMED:_ARMED + 4] = struct.pack('=I', 0)

    def failed(self) -> List[Tuple[Rule, int]]:
        """How many calls have failed, by rule."""
        return [(rule, failed) for rule, (_, failed)
                in zip(self._rules, counts(self._map[:]))]

    def close(self) -> None:
        """Not needed any more."""
        self._map.close()
