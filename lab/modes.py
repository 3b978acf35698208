# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to migrate."""

from dataclasses import dataclass, field, replace
from typing import Any, Dict, Tuple

# What the destination listens on, unless something else is said
TCP = 'tcp:127.0.0.1:0'


@dataclass(frozen=True)
class Mode:
    """A way to migrate.

    capabilities, parameters: of both sides.
    saving: capabilities that only the source has.
    to: 'socket', 'file', or 'exec': cat writes and reads the file, as a QEMU
    older than 8.2 needs.
    """
    capabilities: Tuple[str, ...] = ()
    parameters: Dict[str, Any] = field(default_factory=dict)
    saving: Tuple[str, ...] = ()
    to: str = 'socket'

    @property
    def file(self) -> bool:
        """Whether the destination reads what the source has written before."""
        return self.to != 'socket'

    @property
    def postcopy(self) -> bool:
        """Whether the guest can move before its RAM has."""
        return 'postcopy-ram' in self.capabilities

    @property
    def multifd(self) -> bool:
        """Whether pages go through channels of their own."""
        return 'multifd' in self.capabilities

    @property
    def channels(self) -> int:
        """How many connections there are, the main one included."""
        if self.file:
            return 1
        if self.multifd:
            return 1 + int(self.parameters.get('multifd-channels', 2))
        return 2 if 'postcopy-preempt' in self.capabilities else 1

    def also(self, *capabilities: str, **parameters: Any) -> 'Mode':
        """With more capabilities, and parameters: with _ instead of -."""
        return replace(
            self, capabilities=(*self.capabilities, *capabilities),
            parameters={**self.parameters,
                        **{name.replace('_', '-'): value
                           for name, value in parameters.items()}})

    def uris(self, path: str) -> Tuple[str, str]:
        """Where the source writes and the destination reads; path: of a file."""
        if self.to == 'exec':
            return f'exec:cat >{path}', f'exec:cat {path}'
        return f'file:{path}', f'file:{path}'


PRECOPY = Mode()
MULTIFD = Mode(('multifd',))
POSTCOPY = Mode(('postcopy-ram',))
PREEMPT = Mode(('postcopy-ram', 'postcopy-preempt'))
MAPPED_RAM = Mode(('mapped-ram',), to='file')
SPARSE_RAM = Mode(('sparse-ram',))

MODES = {
    'precopy': PRECOPY,
    'xbzrle': Mode(('xbzrle',)),
    'auto-converge': Mode(('auto-converge',)),
    'return-path': Mode(('return-path',)),
    'no-zero-page-detection': PRECOPY.also(zero_page_detection='none'),
    'multifd': MULTIFD,
    'multifd-legacy': MULTIFD.also(zero_page_detection='legacy'),
    'multifd-no-zero-page-detection': MULTIFD.also(zero_page_detection='none'),
    'multifd-zlib': MULTIFD.also(multifd_compression='zlib'),
    'multifd-zstd': MULTIFD.also(multifd_compression='zstd'),
    'postcopy': POSTCOPY,
    'preempt': PREEMPT,
    'file': Mode(to='file'),
    'exec': Mode(to='exec'),
    'mapped-ram': MAPPED_RAM,
    'mapped-ram-multifd': MAPPED_RAM.also('multifd'),
    'background-snapshot': Mode(saving=('background-snapshot',), to='file'),
    'sparse-ram': SPARSE_RAM,
    'sparse-ram-xbzrle': SPARSE_RAM.also('xbzrle'),
    'sparse-ram-multifd': SPARSE_RAM.also('multifd'),
    'sparse-ram-postcopy': SPARSE_RAM.also(*POSTCOPY.capabilities),
    'sparse-ram-preempt': SPARSE_RAM.also(*PREEMPT.capabilities),
}
