# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest RAM has to hold, and where it may have pages.

Nothing here knows of QEMU processes.  A model of a RAM block is computed from
a seed and from what was written to the block; content and allocation of the
real block are compared with it.

A set of pages is a bytearray with 1 for each page that is in it.
"""

import random
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from lab.memory import PAGE_SIZE as PAGE
from lab.ram import HUGE_PAGE as THP, Extent

# What a page is before the migration
HOLE, ZERO, DATA = range(3)

_ZERO_PAGE = bytes(PAGE)


# Patterns: which page is what

def _runs(rng: random.Random, pages: int, _: int) -> bytearray:
    """Runs of random length; each length's order of magnitude as often."""
    kinds = bytearray()
    while len(kinds) < pages:
        length = 1 << rng.randrange(12)
        length += rng.randrange(length)
        kinds += bytes([rng.randrange(3)]) * length
    return kinds[:pages]


def _alternate(rng: random.Random, pages: int, _: int) -> bytearray:
    """A few kinds in turns."""
    cycle = bytes(rng.choice(((HOLE, DATA), (ZERO, DATA), (HOLE, ZERO),
                              (HOLE, ZERO, DATA), (DATA, HOLE, HOLE))))
    step = rng.choice((1, 1, 2, 16, 512))
    turn = b''.join(bytes([kind]) * step for kind in cycle)
    return bytearray((turn * (pages // len(turn) + 1))[:pages])


def _scattered(rng: random.Random, pages: int, _: int) -> bytearray:
    """Single pages in much of another kind."""
    kinds = bytearray([rng.choice((HOLE, HOLE, ZERO, DATA))]) * pages
    for _ in range(rng.choice((1, 8, 64, 512))):
        kinds[rng.randrange(pages)] = rng.randrange(3)
    return kinds


def _edges(rng: random.Random, pages: int, chunk: int) -> bytearray:
    """One kind, another one next to where something ends.

    That is a huge page, a chunk of clear_bmap, a packet of multifd, the block.
    """
    kinds = bytearray([rng.randrange(3)]) * pages
    step = rng.choice((THP // PAGE, chunk, 128, pages))
    for edge in range(0, pages + 1, step):
        for page in range(edge - rng.randrange(3), edge + rng.randrange(3)):
            if 0 <= page < pages:
                kinds[page] = rng.randrange(3)
    return kinds


def _mixed(rng: random.Random, pages: int, chunk: int) -> bytearray:
    """A pattern of its own for each huge page."""
    kinds = bytearray()
    while len(kinds) < pages:
        kinds += _SIMPLE[rng.choice(_SIMPLE_NAMES)](rng, THP // PAGE, chunk)
    return kinds[:pages]


def _all(kind: int) -> Callable[[random.Random, int, int], bytearray]:
    return lambda rng, pages, chunk: bytearray([kind]) * pages


_SIMPLE = {'holes': _all(HOLE), 'zeroes': _all(ZERO), 'data': _all(DATA),
           'runs': _runs, 'alternate': _alternate, 'scattered': _scattered,
           'edges': _edges}
_SIMPLE_NAMES = tuple(_SIMPLE)
PATTERNS: Dict[str, Callable[[random.Random, int, int], bytearray]] = {
    **_SIMPLE, 'mixed': _mixed}


def expand(pattern: str, seed: int, pages: int, chunk: int) -> bytearray:
    """HOLE, ZERO or DATA for each page.

    chunk: pages that a bit of clear_bmap stands for.
    """
    return PATTERNS[pattern](random.Random(seed), pages, chunk)


def runs_of(kinds: bytes) -> Iterable[Tuple[int, int, int]]:
    """Start, end and kind of each run of pages of one kind."""
    start = 0
    for page in range(1, len(kinds) + 1):
        if page == len(kinds) or kinds[page] != kinds[start]:
            yield start, page, kinds[start]
            start = page


# Content

class Content:
    """Data that follows from a seed; no two pages have the same.

    Most pages are noise; some have a single byte that is not zero, at their
    end or anywhere, for those who look at a part of a page only.
    """

    _NOISE = 1 << 16

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self._noise = rng.randbytes(self._NOISE + PAGE)
        self._salt = rng.getrandbits(32)

    def page(self, number: int) -> bytes:
        """What page number has to hold, if it has data."""
        mixed = (number * 2654435761 + self._salt) & 0xffffffff
        kind = mixed >> 28
        if kind > 1:
            start = (mixed >> 8) % self._NOISE
            return number.to_bytes(8, 'little') + self._noise[start:start + PAGE - 8]
        at = PAGE - 1 if kind == 0 else mixed % PAGE
        page = bytearray(PAGE)
        page[at] = 1 + mixed % 255
        return bytes(page)


class BlockModel:
    """What a RAM block holds.

    content: all of it
    nonzero: pages that have anything but zeroes
    ever: pages that had at any time
    written: pages that were written to since the model was made, or read,
             where that populates as well
    """

    def __init__(self, kinds: bytes, content: Content):
        self.kinds = bytes(kinds)
        self.content = bytearray(len(kinds) * PAGE)
        for start, end, kind in runs_of(self.kinds):
            if kind == DATA:
                self.content[start * PAGE:end * PAGE] = b''.join(
                    map(content.page, range(start, end)))
        self.nonzero = bytearray(kind == DATA for kind in self.kinds)
        self.ever = bytearray(self.nonzero)
        self.written = bytearray(len(kinds))

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.kinds)

    def copy(self) -> 'BlockModel':
        """Another one, which nothing has been written to yet."""
        other = BlockModel(b'', Content(0))
        other.kinds = self.kinds
        other.content = bytearray(self.content)
        other.nonzero = bytearray(self.nonzero)
        other.ever = bytearray(self.ever)
        other.written = bytearray(len(self.kinds))
        return other

    def write(self, offset: int, data: bytes) -> None:
        """Somebody wrote data to the block."""
        self.content[offset:offset + len(data)] = data
        for page in range(offset // PAGE, -(-(offset + len(data)) // PAGE)):
            self._look_at(page)

    def _look_at(self, page: int) -> None:
        nonzero = self.content[page * PAGE:(page + 1) * PAGE] != _ZERO_PAGE
        self.nonzero[page] = nonzero
        self.ever[page] |= nonzero
        self.written[page] = 1

    def touch(self, offset: int) -> None:
        """Somebody read at offset."""
        self.written[offset // PAGE] = 1

    def differing(self, content: bytes, others: Sequence[bytes] = ()) -> List[int]:
        """Pages of content that are not as they have to be.

        others: a page that is as in one of these is right as well.
        """
        if len(content) != len(self.content):
            raise ValueError('a block of another size')
        if content == self.content:
            return []
        return [start // PAGE for start in range(0, len(content), PAGE)
                if not any(content[start:start + PAGE] ==
                           right[start:start + PAGE]
                           for right in (self.content, *others))]


# Sets of pages

def in_extents(extents: Iterable[Extent], pages: int) -> bytearray:
    """Pages that have a byte in one of the extents."""
    flags = bytearray(pages)
    for start, end in extents:
        first, last = start // PAGE, min(-(-end // PAGE), pages)
        flags[first:last] = b'\1' * (last - first)
    return flags


def union(*sets: bytes) -> bytearray:
    """Pages that are in any of the sets."""
    result = 0
    for each in sets:
        result |= int.from_bytes(each, 'little')
    return bytearray(result.to_bytes(len(sets[0]), 'little'))


def minus(one: bytes, other: bytes) -> List[int]:
    """Pages of one that are not in the other, as numbers."""
    left = int.from_bytes(one, 'little') & ~int.from_bytes(other, 'little')
    if not left:
        return []
    return [page for page, flag in enumerate(left.to_bytes(len(one), 'little')) if flag]


def in_units(flags: bytes, unit: int, first: int = 0) -> bytearray:
    """All pages of each unit that has one of the pages.

    unit: pages; first: where in a unit page 0 is.
    """
    result = bytearray(len(flags))
    for start in range(-first, len(flags), unit):
        begin, end = max(start, 0), min(start + unit, len(flags))
        if any(flags[begin:end]):
            result[begin:end] = b'\1' * (end - begin)
    return result


def some(pages: List[int], most: int = 8) -> str:
    """The numbers of a few pages, and how many there are."""
    text = ', '.join(f'{page:#x}' for page in pages[:most])
    return f'{len(pages)} pages ({text}{", ..." if len(pages) > most else ""})'


# Where there may be pages after a migration.  None: anywhere.

def allowed_on_source(before: bytes, written: bytes,
                      known: bool) -> Optional[bytearray]:
    """known: whether its holes can be told, or nothing is read."""
    return union(before, written) if known else None


def allowed_on_destination(model: BlockModel, stale: bytes, policy: str) \
        -> Optional[bytearray]:
    """model: of the destination after all.  stale: what was populated before.

    policy: 'punch': pages that are zero in the end are holes, unless they
    were accessed after they had arrived.
    'keep': what is populated stays so, but nothing becomes it that has only
    been zero.
    'any': nothing is said.
    """
    if policy == 'punch':
        return union(model.nonzero, model.written)
    if policy == 'keep':
        return union(model.ever, model.written, stale)
    assert policy == 'any'
    return None
