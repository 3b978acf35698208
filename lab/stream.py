# SPDX-License-Identifier: GPL-2.0-or-later
"""The migration stream: its records of RAM, and all that is around them.

Made for streams in which RAM is the only thing that is sent bit by bit, so
that its sections come first and the state of the devices after them.
"""

import re
import struct
import zlib
from typing import Dict, List, Optional, Sequence, Tuple

from lab import UserError

# See migration/savevm.h and migration/ram.h
SECTION_START, SECTION_PART, SECTION_END = 1, 2, 3
COMMAND = 8
SECTION_FOOTER = 0x7e
ZERO, MEM_SIZE, DATA, EOS, CONTINUE, XBZRLE, MULTIFD_FLUSH = (
    0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x200)
RAM_HEADER = b'\x03ram' + struct.pack('>II', 0, 4)

PAGE = 4096


class StreamError(UserError):
    """A stream that is not what is known about the format."""


def walk_record(stream: bytes, pos: int) -> Tuple[int, int]:
    """Return the flags of the RAM record at pos, and where it ends."""
    header = struct.unpack_from('>Q', stream, pos)[0]
    flags, addr = header & (PAGE - 1), header & ~(PAGE - 1)
    pos += 8
    if flags & (ZERO | DATA | XBZRLE) and not flags & CONTINUE:
        pos += 1 + stream[pos]
    if flags & ZERO:
        pos += 9 if stream[pos] == 1 else 1
    elif flags & DATA:
        pos += PAGE
    elif flags & XBZRLE:
        pos += 3 + struct.unpack_from('>H', stream, pos + 1)[0]
    elif flags & MEM_SIZE:
        while addr > 0:
            name = stream[pos]
            addr -= struct.unpack_from('>Q', stream, pos + 1 + name)[0]
            pos += 1 + name + 8
    elif not flags & (EOS | MULTIFD_FLUSH):
        raise StreamError(f'unknown RAM flags {flags:#x} at {pos - 8}')
    return flags, pos


class Stream:
    """A captured stream, taken to pieces.

    head: up to the records of the first section that has pages in it
    setup: the records of the section before that (the sizes of all blocks)
    records: those of all pages
    commands: those between sections of RAM
    tail: what follows the last section of RAM
    """

    def __init__(self, stream: bytes):
        start = stream.find(RAM_HEADER)
        if start < 0:
            raise StreamError('there is no section of RAM')
        self._section = stream[start - 4:start]
        self.setup, pos = self._walk(stream, start + len(RAM_HEADER))
        self.records: List[bytes] = []
        self.commands: List[bytes] = []
        self.head = b''
        while pos < len(stream):
            if stream[pos] == COMMAND:
                end = pos + 5 + struct.unpack_from('>H', stream, pos + 3)[0]
                self.commands.append(stream[pos:end])
                pos = end
                continue
            if (stream[pos] not in (SECTION_PART, SECTION_END)
                    or stream[pos + 1:pos + 5] != self._section):
                break
            self.head = self.head or stream[:pos + 5]
            records, pos = self._walk(stream, pos + 5)
            self.records += records
        if not self.records:
            raise StreamError('there are no pages of RAM')
        self.tail = stream[pos:]

    def _walk(self, stream: bytes, pos: int) -> Tuple[List[bytes], int]:
        """Return the records of a section, and where the next one starts."""
        records, flags = [], 0
        while not flags & EOS:
            flags, end = walk_record(stream, pos)
            records.append(stream[pos:end])
            pos = end
        footer = bytes([SECTION_FOOTER]) + self._section
        if stream[pos:pos + 5] == footer:
            pos += 5
        return records, pos


def _flags(record: bytes) -> int:
    return walk_record(record, 0)[0]


def without_boundaries(records: Sequence[bytes]) -> List[bytes]:
    """The records, in a form that does not tell where sections end.

    Where they do depends on time, and so do flushes of multifd.  The first page
    of a section comes with the name of its block, the others do not unless the
    block is another one: here all of them do.
    """
    block = b''
    result = []
    for record in records:
        flags = _flags(record)
        if flags & (EOS | MULTIFD_FLUSH):
            continue
        if flags & (ZERO | DATA | XBZRLE):
            if flags & CONTINUE:
                header = struct.unpack_from('>Q', record)[0] & ~CONTINUE
                record = struct.pack('>Q', header) + block + record[8:]
            else:
                block = record[8:9 + record[8]]
        result.append(record)
    return result


# A section of RAM that has no page in it, but maybe flushes
_EMPTY_SECTION = re.compile(
    rb'[\x02\x03](.{4})(?:\0{6}\x02\0)*\0{7}\x10\x7e\1', re.DOTALL)


def without_empty_sections(file: bytes) -> bytes:
    """A mapped-ram file, whose pages are in no section.

    How many sections there are depends on time.
    """
    return _EMPTY_SECTION.sub(b'', file)


# See MultiFDInit_t and MultiFDPacket_t in migration/multifd.[ch]
_INIT = struct.Struct('>II16sB7x32x')
_PACKET = struct.Struct('>IIIIIIQI28x256s')
_PACKET_PAGES = 128
_SYNC = 1
_ZLIB = 1 << 1
_COMPRESSION = 0x1f << 1


def multifd_pages(channel: bytes) -> Dict[Tuple[bytes, int], bytes]:
    """What came through a channel of multifd: pages, by block and offset.

    A page that is said to be zero is empty.  How the pages are put into packets
    depends on time: what there is of a packet when the migration ends is sent.
    Knows packets without compression and with zlib.
    """
    pos = _INIT.size
    pages: Dict[Tuple[bytes, int], bytes] = {}
    zlib_stream = zlib.decompressobj()
    while pos < len(channel):
        (magic, version, flags, _, normal, size, _, zero,
         block) = _PACKET.unpack_from(channel, pos)
        if magic != 0x11223344 or version != 1:
            raise StreamError(f'no packet of multifd at {pos}')
        pos += _PACKET.size
        offsets = struct.unpack_from(f'>{_PACKET_PAGES}Q', channel, pos)
        pos += 8 * _PACKET_PAGES
        data = channel[pos:pos + size]
        pos += size
        if flags & _SYNC and not normal and not zero:
            continue
        if flags & _COMPRESSION == _ZLIB:
            data = zlib_stream.decompress(data)
        elif flags & _COMPRESSION:
            raise StreamError(f'a packet with unknown flags {flags:#x}')
        if len(data) != normal * PAGE:
            raise StreamError(f'{len(data)} bytes in {normal} pages')
        for number, offset in enumerate(offsets[:normal + zero]):
            key = block.rstrip(b'\0'), offset
            if key in pages:
                raise StreamError(f'a page is there twice: {key}')
            at = number * PAGE
            pages[key] = data[at:at + PAGE]
    return pages


def multifd_difference(one: bytes, other: bytes) -> Optional[str]:
    """What differs between two channels of multifd, None if nothing does."""
    if one[:_INIT.size] != other[:_INIT.size]:
        return 'the first packet'
    left, right = multifd_pages(one), multifd_pages(other)
    if left == right:
        return None
    block, offset = min(key for key in {**left, **right}
                        if left.get(key) != right.get(key))
    return f'the page at {offset:#x} of {block.decode()}'


def describe(record: Optional[bytes]) -> str:
    """A record without_boundaries(), for people; None is the end."""
    if record is None:
        return 'the end'
    flags = _flags(record)
    if not flags & (ZERO | DATA | XBZRLE):
        return f'flags {flags:#x}, {len(record)} bytes'
    header = struct.unpack_from('>Q', record)[0]
    name = record[9:9 + record[8]].decode(errors='replace')
    body = record[9 + record[8]:]
    if flags & ZERO:
        kind = ('zero page' if len(body) == 1 else
                f'{struct.unpack(">Q", body[1:])[0]} zero pages')
    else:
        kind = 'data' if flags & DATA else f'xbzrle of {len(body)} bytes'
    return f'{kind} at {header & ~(PAGE - 1):#x} of {name}'


def first_difference(one: bytes, other: bytes) -> Optional[int]:
    """Offset of the first byte that differs, None if there is none."""
    if one == other:
        return None
    # In halves: to compare byte by byte takes long
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def difference(one: Stream, other: Stream) -> Optional[str]:
    """What differs first between two streams, None if nothing does.

    Where the sections of RAM end does not count.
    """
    # A section that is not the last one has another type than that
    heads = one.head[:-5], other.head[:-5]
    for where, left, right in (('before', *heads), ('after', one.tail, other.tail)):
        byte = first_difference(left, right)
        if byte is not None:
            return (f'byte {byte} of {len(left)} and {len(right)} {where} the '
                    f'pages')
    if one.commands != other.commands:
        return f'commands {one.commands} and {other.commands}'
    records = [without_boundaries(each.records) for each in (one, other)]
    for number, (left, right) in enumerate(zip(*records)):
        if left != right:
            return (f'record {number}: {describe(left)}, and '
                    f'{describe(right)}'
                    f'{", with other bytes" if len(left) == len(right) else ""}')
    if len(records[0]) != len(records[1]):
        return f'{len(records[0])} and {len(records[1])} records'
    return None
