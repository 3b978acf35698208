# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM with data, populated zeroes and holes, made from a seed.

All sizes and offsets are in bytes, unless a name says otherwise.
"""

import os
import random
from typing import Iterable, Iterator, List, Tuple

from lab.memory import PAGE_SIZE, Extent, GuestRam, merge_extents

DATA, ZERO, HOLE = 'data', 'zero', 'hole'

# How much of RAM is what, about
_KINDS = {DATA: 2, ZERO: 1, HOLE: 5}

# Pages in a run: single ones, and more than a packet of multifd has
_LONGEST_RUN = 300

_ZERO_PAGE = bytes(PAGE_SIZE)


def layout(size: int, seed: int) -> Iterator[Tuple[str, int, int]]:
    """Kind, start and end (exclusive) of all runs in RAM of this size."""
    rng = random.Random(seed)
    at, last = 0, HOLE
    while at < size:
        kinds = [kind for kind in _KINDS if kind != last]
        last = rng.choices(kinds, [_KINDS[kind] for kind in kinds])[0]
        pages = rng.choice((1, 1, 2, rng.randrange(3, 40),
                            rng.randrange(40, _LONGEST_RUN)))
        end = min(at + pages * PAGE_SIZE, size)
        yield last, at, end
        at = end


def page(rng: random.Random) -> bytes:
    """A page that is not zero, now and then only in its last byte."""
    if rng.random() < 0.1:
        return _ZERO_PAGE[:-1] + bytes([rng.randrange(1, 256)])
    return rng.randbytes(PAGE_SIZE)


def write(ram: GuestRam, seed: int) -> None:
    """Write data and zeroes; what is there already stays where holes are due.
    """
    rng = random.Random(seed)
    fd = ram.open()
    try:
        for kind, start, end in layout(ram.size, seed):
            if kind == HOLE:
                continue
            for offset in range(start, end, PAGE_SIZE):
                data = page(rng) if kind == DATA else _ZERO_PAGE
                os.pwrite(fd, data, ram.base + offset)
    finally:
        os.close(fd)


def populated(ram: GuestRam) -> List[Extent]:
    """Where RAM is no hole."""
    fd = ram.open()
    try:
        return list(ram.extents(fd))
    finally:
        os.close(fd)


def round_out(extents: Iterable[Extent], granule: int) -> List[Extent]:
    """The same, made of whole granules."""
    return merge_extents(
        ((start // granule * granule, -(-end // granule) * granule)
         for start, end in extents), ())


def total(extents: List[Extent]) -> int:
    """How much it is, of extents that do not overlap."""
    return sum(end - start for start, end in extents)


def nonzero(ram: GuestRam) -> List[Extent]:
    """Where RAM holds anything but zeroes; only what is populated is read."""
    found = []
    fd = ram.open()
    try:
        for start, end in ram.extents(fd):
            for offset in range(start, end, PAGE_SIZE):
                if os.pread(fd, PAGE_SIZE, ram.base + offset) != _ZERO_PAGE:
                    found.append((offset, offset + PAGE_SIZE))
    finally:
        os.close(fd)
    return merge_extents(found, ())
