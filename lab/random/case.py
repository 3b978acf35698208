# SPDX-License-Identifier: GPL-2.0-or-later
"""What a random migration is: drawn from a seed, and nothing else.

draw() knows the rules of QEMU: which capabilities, parameters, transports and
backends it takes together.  A case that it returns has to migrate.  policy()
and source_reads() know those of docs/devel/migration/sparse-ram.rst: where
pages may be afterwards.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Tuple

from lab.modes import MODES
from lab.ram import KINDS
from lab.random.model import PATTERNS

PATCHED, STOCK = 'patched', 'stock'


# Object that a channel is encrypted with
TLS = 'tls0'

# How often each is drawn
_BACKEND_WEIGHTS = {
    'memfd': 30, 'memfd-private': 8, 'hugetlb': 8, 'hugetlb-private': 2,
    'shm': 5, 'shm-file': 20, 'shm-file-private': 4, 'shm-file-offset': 8,
    'other-file': 4, 'other-file-private': 2, 'anonymous': 12,
    'anonymous-shared': 4}

BACKENDS = {name: KINDS[name] for name in _BACKEND_WEIGHTS}

# Of hugetlbfs there is little: MiB of a block, of which a case has only one
_HUGETLB_SIZES = (8, 10, 12, 16)

_MODE_WEIGHTS = {
    'precopy': 20, 'xbzrle': 8, 'multifd': 25, 'postcopy': 20, 'file': 7,
    'mapped-ram': 8, 'mapped-ram-multifd': 8, 'background-snapshot': 4}

# How often it is this instead, in percent
_SAVEVM = 4

_TO_FILE = (*(name for name in _MODE_WEIGHTS if MODES[name].file), 'savevm')
# Modes that have migration to themselves
_ALONE = ('background-snapshot', 'savevm')
_MULTIFD = tuple(name for name in _MODE_WEIGHTS if MODES[name].multifd)

# What a guest that really runs is good for
_LIVE_MODES = ('precopy', 'xbzrle', 'multifd', 'postcopy')


@dataclass(frozen=True)
class BlockSide:
    """A RAM block on one side.

    pattern, pattern_seed: what it has before, see model.expand()
    in_process: that was written by QEMU's process, and not to the file
    offset: where it begins in its file, in bytes
    """
    backend: str
    prealloc: bool
    pattern: str
    pattern_seed: int
    in_process: bool
    offset: int = 0

    def __str__(self) -> str:
        return (self.backend
                + (f',offset={self.offset:#x}' if self.offset else '')
                + (',prealloc=on' if self.prealloc else '')
                + f' [{self.pattern}'
                + (', by the process' if self.in_process else '') + ']')


@dataclass(frozen=True)
class Block:
    """A RAM block; size in MiB."""
    size: int
    source: BlockSide
    destination: BlockSide


@dataclass(frozen=True)
class Side:
    """A QEMU.

    holes: not x-ram-holes=off
    capabilities, parameters: what is set, and to what
    locked: -overcommit mem-lock=on
    """
    binary: str
    holes: bool
    capabilities: Tuple[str, ...]
    parameters: Dict[str, Any] = field(default_factory=dict)
    locked: bool = False

    @property
    def keeps_holes(self) -> bool:
        """Whether there is something to be expected of it."""
        return self.binary == PATCHED and self.holes

    def __str__(self) -> str:
        return ' '.join([
            self.binary, *(() if self.holes else ('x-ram-holes=off',)),
            *(('mem-lock=on',) if self.locked else ()),
            *self.capabilities,
            *(f'{name}={value}' for name, value in self.parameters.items())])


@dataclass(frozen=True)
class Case:
    """A random migration.

    transport: tcp, unix, fd (a socket, or a file); file, file-offset, exec;
    disk, of an internal snapshot
    machine: type and properties
    properties: of the object 'migration', on both sides
    thp: transparent huge pages, of anonymous and of shared memory
    dirty: who writes during the migration: '', qtest, guest
    bandwidth: bytes a second, until what is to be done meanwhile is done
    switch: postcopy starts this many milliseconds after the migration; None:
    never
    """
    seed: int
    mode: str
    transport: str
    source: Side
    destination: Side
    blocks: Tuple[Block, ...]
    machine: str
    properties: Dict[str, Any]
    thp: bool
    dirty: str
    bandwidth: int
    switch: Optional[int]

    @property
    def to_file(self) -> bool:
        """Whether the destination starts when the source has ended."""
        return self.mode in _TO_FILE

    @property
    def chunk(self) -> int:
        """Pages that a bit of clear_bmap stands for."""
        return 1 << self.properties['x-clear-bitmap-shift']

    @property
    def postcopy(self) -> bool:
        """Whether the capability is set."""
        return 'postcopy-ram' in self.source.capabilities

    @property
    def zero_page_detection(self) -> str:
        """The source's."""
        return self.source.parameters.get('zero-page-detection', 'multifd')

    def __str__(self) -> str:
        lines = [
            f'seed {self.seed}: {self.mode} by {self.transport}, '
            f'-machine {self.machine}',
            f'  source: {self.source}',
            f'  destination: {self.destination}',
            '  both: ' + ' '.join(f'{name}={value}' for name, value
                                  in self.properties.items())
            + (' transparent huge pages' if self.thp else '')]
        lines += [f'  block {number}: {block.size} MiB, {block.source} to '
                  f'{block.destination}'
                  for number, block in enumerate(self.blocks)]
        if self.dirty:
            lines.append(f'  written to by {self.dirty} meanwhile')
        if self.mode == 'postcopy':
            lines.append('  postcopy starts ' + (
                'never' if self.switch is None else
                f'after {self.switch} ms'))
        return '\n'.join(lines)


def _pick(rng: random.Random, weights: Dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _chance(rng: random.Random, percent: int) -> bool:
    return rng.randrange(100) < percent


class _Draw:
    """Makes a case; each method has the rules for one part of it."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = random.Random(seed)
        # What came later: seeds stay what they are, but for that
        self.rng_later = random.Random(f'{seed} later')
        rng = self.rng
        self.mode = _pick(rng, _MODE_WEIGHTS)
        if _chance(self.rng_later, _SAVEVM):
            self.mode = 'savevm'
        binaries = rng.choices(((PATCHED, PATCHED), (STOCK, PATCHED),
                                (PATCHED, STOCK)), (80, 10, 10))[0]
        self.binaries: Tuple[str, str] = binaries
        self.holes = [binary == STOCK or not _chance(rng, 8) for binary in binaries]
        self.locked = [_chance(self.rng_later, 4) for _ in binaries]
        self.dirty = self._dirty()
        self.transport = self._transport()
        self.capabilities = self._capabilities()
        self.parameters = self._parameters()
        if self._can_be_encrypted() and _chance(self.rng_later, 15):
            for parameters in self.parameters:
                parameters['tls-creds'] = TLS

    def _dirty(self) -> str:
        rng = self.rng
        live = _chance(rng, 5)
        if live and self.mode in _LIVE_MODES:
            return 'guest'
        # A snapshot must not have what is written after it was begun, and
        # nobody can tell when that is
        if _chance(rng, 50) and self.mode not in _ALONE:
            return 'qtest'
        return ''

    def _transport(self) -> str:
        """Also sets with_preempt: it needs a second channel."""
        rng = self.rng
        self.with_preempt = self.mode == 'postcopy' and _chance(rng, 40)
        if self.mode in ('mapped-ram', 'mapped-ram-multifd'):
            return rng.choice(('file', 'file-offset'))
        if self.mode == 'savevm':
            return 'disk'
        if self.mode in _TO_FILE:
            return rng.choice(('file', 'file-offset', 'exec', 'fd'))
        if self.mode == 'multifd' or self.with_preempt:
            return rng.choice(('tcp', 'unix'))
        return rng.choice(('tcp', 'unix', 'fd'))

    def _capabilities(self) -> List[List[str]]:
        """Of the source, and of the destination."""
        rng = self.rng
        source: List[str] = []
        if self.mode == 'savevm':
            return [[], []]
        mode = MODES['preempt' if self.with_preempt else self.mode]
        if mode.saving:
            return [[*mode.saving], []]
        both = [*mode.capabilities]
        if 'mapped-ram' not in both and self._both_patched() and _chance(rng, 40):
            both.append('sparse-ram')
        if mode.postcopy and _chance(rng, 30):
            both.append('postcopy-blocktime')
        if self.mode in ('postcopy', 'file') and _chance(rng, 20):
            both.append('xbzrle')
        if self.mode not in _TO_FILE and _chance(rng, 40):
            both.append('return-path')
            if _chance(rng, 30):
                both.append('switchover-ack')
        for name, percent in (('validate-uuid', 20), ('late-block-activate', 10)):
            if _chance(rng, percent):
                both.append(name)
        for name, percent in (('auto-converge', 15), ('release-ram', 15)):
            if _chance(rng, percent):
                source.append(name)
        # What is written before the last look at the dirty bitmap arrives:
        # this is how it is known which writes those are
        if self.dirty == 'qtest':
            source.append('pause-before-switchover')
        return [both + source, both]

    def _can_be_encrypted(self) -> bool:
        return (self.mode not in _TO_FILE
                and 'zero-copy-send' not in self.capabilities[0])

    def _both_patched(self) -> bool:
        return self.binaries == (PATCHED, PATCHED)

    def _parameters(self) -> List[Dict[str, Any]]:
        """Of the source, and of the destination."""
        rng = self.rng
        source: Dict[str, Any] = {}
        both: Dict[str, Any] = {}
        detection = ('none', 'legacy', 'multifd')
        if _chance(rng, 50):
            source['zero-page-detection'] = rng.choices(detection, (15, 35, 50))[0]
        if self.mode in _MULTIFD:
            both['multifd-channels'] = rng.choice((1, 2, 3, 4, 8))
        if self.mode == 'multifd':
            method = rng.choice(('none', 'none', 'none', 'zlib', 'zstd'))
            both['multifd-compression'] = method
            if method != 'none' and _chance(rng, 50):
                both[f'multifd-{method}-level'] = rng.randrange(4)
        if self.mode == 'mapped-ram-multifd' and _chance(rng, 40):
            both['direct-io'] = True
        if 'xbzrle' in self.capabilities[0]:
            source['xbzrle-cache-size'] = rng.choice((1 << 16, 1 << 20, 1 << 26))
        if (self.mode == 'multifd' and self.transport == 'tcp'
                and both['multifd-compression'] == 'none'
                and _chance(rng, 15)):
            self.capabilities[0].append('zero-copy-send')
        if self.mode == 'postcopy':
            source['max-postcopy-bandwidth'] = rng.choice(
                (0, 1 << 18, 1 << 20, 1 << 24))
        return [{**both, **source}, both]

    def _stale_would_survive(self) -> bool:
        """Whether the destination leaves old content alone, as stock QEMU does,
        and the patched one with x-ram-holes=off.
        """
        if self.binaries[1] == PATCHED and self.holes[1]:
            return False
        if self.mode.startswith('mapped-ram'):
            return True
        return (self.mode == 'multifd'
                and self.parameters[0].get('zero-page-detection',
                                           'multifd') == 'multifd')

    def _is_known_to_be_zero(self, side: BlockSide) -> bool:
        """Whether the destination does not look at what QEMU has created
        itself, as nothing but QEMU can have written to it.
        """
        return (self.binaries[1] == PATCHED and self.holes[1]
                and (self.mode == 'multifd'
                     or self.mode.startswith('mapped-ram'))
                and BACKENDS[side.backend].directory is None
                and (side.prealloc or self.locked[1]
                     or side.backend == 'anonymous-shared'))

    def _backends(self, hugetlb: bool) -> Dict[str, int]:
        weights = dict(_BACKEND_WEIGHTS)
        for name, backend in BACKENDS.items():
            # Postcopy and the snapshot have page faults handled, which can
            # be done for these only
            if backend.fs == 'other' and self.mode in ('postcopy',
                                                       'background-snapshot'):
                del weights[name]
            elif backend.fs == 'hugetlbfs' and not hugetlb:
                del weights[name]
        return weights

    def _block_side(self, name: str, pattern: str, locked: bool) -> BlockSide:
        rng = self.rng
        backend = BACKENDS[name]
        prealloc = _chance(rng, 8)
        in_process = _chance(rng, 40)
        # Else QEMU has pages of its own before there is something in the file
        too_late = ((prealloc or locked) and not backend.shared
                    and backend.directory is None)
        if backend.fs == 'other' and not backend.shared:
            # QEMU writes nothing to it before a migration, so an empty file is
            # zero: ram_block_is_pristine()
            in_process = False
        return BlockSide(
            backend=name,
            prealloc=prealloc,
            pattern=pattern,
            pattern_seed=rng.getrandbits(32),
            in_process=in_process or too_late or backend.fs is None,
            offset=(rng.choice((1, 3, 512, 515, 2048)) * 4096
                    if backend.offset else 0))

    def _pattern(self, empty: int) -> str:
        """empty: how often it is nothing but holes, in percent."""
        if _chance(self.rng, empty):
            return 'holes'
        return self.rng.choice(list(PATTERNS))

    def _block(self, hugetlb: bool, most: int) -> Block:
        rng = self.rng
        names = [_pick(rng, self._backends(hugetlb)) for _ in range(2)]
        huge = [BACKENDS[name].fs == 'hugetlbfs' for name in names]
        if self.mode == 'postcopy' and huge[0] != huge[1]:
            names[1], huge[1] = names[0], huge[0]   # pages of the same size
        if any(huge):
            size = rng.choice(_HUGETLB_SIZES)
        else:
            size = rng.randrange(4, most)
        stale = 100 if self._stale_would_survive() else 25
        source, destination = (
            self._block_side(name, self._pattern(empty), locked)
            for name, empty, locked in zip(names, (10, stale), self.locked))
        if self._is_known_to_be_zero(destination):
            destination = replace(destination, pattern='holes')
        return Block(size, source, destination)

    def _blocks(self) -> Tuple[Block, ...]:
        rng = self.rng
        if self.dirty == 'guest':
            # Room for what the guest writes to
            block = self._block(False, 10)
            return (Block(rng.choice((24, 32, 40)), block.source, block.destination),)
        count = rng.choices((1, 2, 3), (70, 20, 10))[0]
        blocks: List[Block] = []
        for _ in range(count):
            hugetlb = not any(BACKENDS[side.backend].fs == 'hugetlbfs'
                              for block in blocks
                              for side in (block.source, block.destination))
            blocks.append(self._block(hugetlb, 48 // count))
        return tuple(blocks)

    def _machine(self) -> str:
        types = {'pc': 70, 'q35': 8, 'pc-i440fx-9.1': 8, 'pc-i440fx-8.1': 7,
                 'pc-i440fx-6.0': 7}
        return _pick(self.rng, types)

    def case(self) -> Case:
        """The case."""
        rng = self.rng
        sides = [Side(binary, holes, tuple(capabilities), parameters, locked)
                 for binary, holes, capabilities, parameters, locked
                 in zip(self.binaries, self.holes, self.capabilities,
                        self.parameters, self.locked)]
        properties: Dict[str, Any] = {
            'x-clear-bitmap-shift': rng.choice((6, 7, 9, 12, 18))}
        if self.mode in _MULTIFD and _chance(rng, 50):
            properties['multifd-flush-after-each-section'] = rng.choice(('on', 'off'))
        return Case(
            seed=self.seed, mode=self.mode, transport=self.transport,
            source=sides[0], destination=sides[1], blocks=self._blocks(),
            machine=self._machine(), properties=properties,
            thp=_chance(rng, 15), dirty=self.dirty,
            bandwidth=rng.choice((1 << 16, 1 << 18, 1 << 20, 1 << 23)),
            switch=(None if self.mode != 'postcopy' or _chance(rng, 10)
                    else rng.choice((0, 0, 1, 10, 50, 120))))


def draw(seed: int) -> Case:
    """The case of a seed; always the same."""
    return _Draw(seed).case()


# What docs/devel/migration/sparse-ram.rst says about a case

def policy(case: Case, block: Block) -> str:
    """What is left on the destination, for
    model.allowed_on_destination().
    """
    side = block.destination
    backend = BACKENDS[side.backend]
    if not case.destination.keeps_holes or side.prealloc or case.destination.locked:
        return 'any'
    if case.zero_page_detection == 'none':
        return 'any'            # all pages arrive as data
    if backend.fs == 'other':
        return 'any'
    if not backend.shared:
        # Postcopy places all pages of a block that cannot be asked; in
        # anonymous memory, a zero page is no page
        if backend.fs is None:
            return 'keep'
        return 'keep' if backend.fs == 'tmpfs' and not case.postcopy else 'any'
    if backend.fs == 'hugetlbfs' or case.thp:
        return 'keep'           # not punched, or not if a huge page is full
    if backend.directory is not None:
        return 'keep'           # of a file that was there, nothing is freed
    return 'punch'


def source_reads(case: Case, block: Block) -> bool:
    """Whether the source reads holes, and so may have more pages after it."""
    backend = BACKENDS[block.source.backend]
    if not case.source.keeps_holes:
        return backend.fs is not None
    if backend.fs is None:
        return False            # what is read is not allocated
    return not backend.holes_known
