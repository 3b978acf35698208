# SPDX-License-Identifier: GPL-2.0-or-later
"""What guest RAM holds: made from a seed, and compared.

All sizes and offsets are in bytes, unless a name says otherwise.
"""

import os
import random
from array import array
from dataclasses import dataclass
from typing import Iterable, Iterator, List, Optional, Tuple

from lab.memory import KIB, MIB, PAGE_SIZE
from lab.ram import Extent, Ram, merge_extents, pread_all, pwrite_all, without

# With data, populated zeroes and holes

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


def write(ram: Ram, seed: int) -> None:
    """Write data and zeroes; what is there already stays where holes are due.
    """
    rng = random.Random(seed)
    with ram.opened() as fd:
        for kind, start, end in layout(ram.size, seed):
            if kind == HOLE:
                continue
            for offset in range(start, end, PAGE_SIZE):
                data = page(rng) if kind == DATA else _ZERO_PAGE
                os.pwrite(fd, data, ram.base + offset)


def round_out(extents: Iterable[Extent], granule: int) -> List[Extent]:
    """The same, made of whole granules."""
    return merge_extents(
        ((start // granule * granule, -(-end // granule) * granule)
         for start, end in extents), ())


def total(extents: List[Extent]) -> int:
    """How much it is, of extents that do not overlap."""
    return sum(end - start for start, end in extents)


def nonzero(ram: Ram) -> List[Extent]:
    """Where RAM holds anything but zeroes; only what is populated is read."""
    found = []
    with ram.opened() as fd:
        for start, end in ram.extents():
            for offset in range(start, end, PAGE_SIZE):
                if os.pread(fd, PAGE_SIZE, ram.base + offset) != _ZERO_PAGE:
                    found.append((offset, offset + PAGE_SIZE))
    return merge_extents(found, ())


# Comparing

@dataclass(frozen=True)
class Comparison:
    """How the RAM of two guests differs.

    bytes_read: what was read on each side; all else is a hole on both.
    bytes_nonzero: pages, among those, that hold anything but zeroes.
    first_difference: offset of the first page that differs, or None.
    """
    bytes_read: int
    bytes_nonzero: int
    differing_pages: int
    first_difference: Optional[int]

    @property
    def identical(self) -> bool:
        return self.differing_pages == 0

    def __str__(self) -> str:
        return (f'{self.differing_pages} pages differ, the first at '
                f'{self.first_difference or 0:#x}')


def _pages(data: bytes) -> Iterator[bytes]:
    return (data[i:i + PAGE_SIZE] for i in range(0, len(data), PAGE_SIZE))


# What one read() asks for when RAM is compared
_COMPARE_CHUNK = 1 * MIB

_ZERO_CHUNK = bytes(_COMPARE_CHUNK)


def _count_nonzero_pages(data: bytes) -> int:
    if data == _ZERO_CHUNK:
        return 0
    return sum(page != _ZERO_PAGE for page in _pages(data))


def _read_both(one: Ram, other: Ram) -> Iterator[Tuple[int, bytes, bytes]]:
    """Offset and content, a chunk at a time, wherever either has data."""
    with one.opened() as left, other.opened() as right:
        for start, end in merge_extents(one.extents(), other.extents()):
            for offset in range(start, end, _COMPARE_CHUNK):
                length = min(_COMPARE_CHUNK, end - offset)
                yield (offset, pread_all(left, one.base + offset, length),
                       pread_all(right, other.base + offset, length))


def compare(one: Ram, other: Ram) -> Comparison:
    """Compare two guests that do not run, page by page."""
    if one.size != other.size:
        raise ValueError(f'RAM of {one.size} and of {other.size} bytes')
    read = nonzero = 0
    differing: List[int] = []
    for offset, left, right in _read_both(one, other):
        read += len(left)
        nonzero += _count_nonzero_pages(left)
        if left != right:
            differing += [offset + i * PAGE_SIZE for i, pages
                          in enumerate(zip(_pages(left), _pages(right)))
                          if pages[0] != pages[1]]
    return Comparison(read, nonzero * PAGE_SIZE, len(differing),
                      differing[0] if differing else None)


# Giving a guest something to carry

# Single pages to write, at most, and how much RAM there is for each at least:
# with transparent huge pages every one of them may cost 2 MiB.
_SINGLE_PAGES = 64
_SINGLE_PAGE_DISTANCE = 16 * MIB


def data_layout(size: int, amount: int) -> List[Extent]:
    """Where to put this amount of data into RAM of this size.

    Some of it in single pages all over, the last page of RAM included, the
    rest in one run from the middle on.  Sorted, page aligned, not
    overlapping; less than amount if RAM is too small for that.
    """
    amount = min(amount, size // 2)
    single = min(_SINGLE_PAGES, size // _SINGLE_PAGE_DISTANCE, amount // PAGE_SIZE)
    run = (amount // PAGE_SIZE - single) * PAGE_SIZE
    middle = size // 2 // PAGE_SIZE * PAGE_SIZE
    layout = [(middle, middle + run)] if run else []
    if single:
        step = size // single // PAGE_SIZE * PAGE_SIZE
        ends = (size - i * step for i in range(single))
        layout += [(end - PAGE_SIZE, end) for end in ends
                   if not middle < end <= middle + run]
    return sorted(layout)


def write_data(ram: Ram, amount: int) -> int:
    """Put this amount of data into holes of guest RAM; returns how much was.

    What the guest has there is left alone.  The guest does not see it come,
    nor does its dirty log: only for before a migration.  No two pages have
    the same content, so that one at the wrong place is noticed.
    """
    noise = random.Random(0).randbytes(PAGE_SIZE)
    written = 0
    with ram.opened() as fd:
        taken = list(ram.extents())
        for start, end in without(data_layout(ram.size, amount), taken):
            for offset in range(start, end, PAGE_SIZE):
                page = offset.to_bytes(8, 'little') + noise[8:]
                written += os.pwrite(fd, page, ram.base + offset)
    return written


# One pseudo-random block, written again and again with its pages numbered,
# is as good as random data for anything that looks at one page at a time
_FILL_BLOCK = 16 * MIB
_WORD = 8                       # bytes of a page's number


def _numbered(block: bytearray, first: int) -> bytearray:
    """Number the pages of block from first on, in their first bytes."""
    words = memoryview(block).cast('Q')
    count = len(block) // PAGE_SIZE
    words[::PAGE_SIZE // _WORD] = memoryview(array('Q', range(first, first + count)))
    return block


def fill(ram: Ram, step: int = 1) -> int:
    """Put data into every step-th page, from the first; returns how much.

    Overwrites what is there: for a guest that never runs.  No two pages have
    the same content, and none compresses or is zero.
    """
    if ram.size % PAGE_SIZE:
        raise ValueError(f'RAM of {ram.size} bytes is not whole pages')
    noise = random.Random(0).randbytes(min(_FILL_BLOCK, ram.size))
    block = bytearray(noise)
    written = 0
    with ram.opened() as fd:
        for offset in range(0, ram.size, len(noise)):
            length = min(len(noise), ram.size - offset)
            view = memoryview(_numbered(block, 1 + offset // PAGE_SIZE))
            written += _pwrite_pages(fd, view[:length], ram.base + offset, step)
    return written


# What scatter() writes at one place
EXTENT = 64 * KIB


def scatter(ram: Ram, amount: int) -> int:
    """Spread data over RAM, in extents of EXTENT; returns how much.

    Page for page it is the data that fill() puts into RAM of that size.  The
    extents are somewhere in parts of RAM of the same size, always at the same
    places.  At the start of each part, they could all lie across the border of
    two page tables.
    """
    count = amount // EXTENT
    if amount % EXTENT or not 0 < amount <= ram.size:
        raise ValueError(f'{amount} bytes in {ram.size} bytes of RAM')
    distance = ram.size // count // PAGE_SIZE * PAGE_SIZE
    places = random.Random(0)
    block = bytearray(random.Random(0).randbytes(_FILL_BLOCK))
    per_block = _FILL_BLOCK // EXTENT
    written = 0
    with ram.opened() as fd:
        for first in range(0, count, per_block):
            view = memoryview(_numbered(block, 1 + first * EXTENT // PAGE_SIZE))
            for number in range(first, min(first + per_block, count)):
                at = (number - first) * EXTENT
                where = (number * distance +
                         places.randrange(distance // EXTENT) * EXTENT)
                written += pwrite_all(fd, view[at:at + EXTENT], ram.base + where)
    return written


def _pwrite_pages(fd: int, data: memoryview, offset: int, step: int) -> int:
    """pwrite() every step-th page of data, or all at once."""
    if step == 1:
        return pwrite_all(fd, data, offset)
    return sum(pwrite_all(fd, data[start:start + PAGE_SIZE], offset + start)
               for start in range(0, len(data), step * PAGE_SIZE))
