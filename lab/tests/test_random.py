# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of lab/random that need no QEMU."""

import os
import random
import unittest
from dataclasses import replace

from lab.random import case as random_case, model
from lab.random.case import BACKENDS, PATCHED, STOCK, TLS
from lab.random.model import DATA, HOLE, PAGE, ZERO, BlockModel, Content
from lab.ram import Mapping, parse_blocks

CASES = [random_case.draw(seed) for seed in range(6000)]


def capabilities(case):
    """Of each side."""
    return set(case.source.capabilities), set(case.destination.capabilities)


class Draw(unittest.TestCase):
    """What is drawn, QEMU takes: as migrate_caps_check() and others say."""

    def test_repeats(self):
        for seed in (0, 1, 4711, 2 ** 32):
            self.assertEqual(random_case.draw(seed), random_case.draw(seed))
        self.assertNotEqual(random_case.draw(1), random_case.draw(2))

    def test_capabilities_that_exclude_each_other(self):
        pairs = (('multifd', 'xbzrle'), ('multifd', 'postcopy-ram'),
                 ('mapped-ram', 'xbzrle'), ('mapped-ram', 'postcopy-ram'),
                 ('sparse-ram', 'mapped-ram'),
                 ('sparse-ram', 'background-snapshot'))
        for case in CASES:
            for side in capabilities(case):
                for one, other in pairs:
                    self.assertFalse({one, other} <= side, str(case))

    def test_encryption(self):
        for case in CASES:
            sides = [side.parameters.get('tls-creds')
                     for side in (case.source, case.destination)]
            self.assertEqual(sides[0], sides[1])
            if sides[0]:
                self.assertFalse(case.to_file)
                self.assertNotIn('zero-copy-send', case.source.capabilities)

    def test_internal_snapshots(self):
        for case in CASES:
            self.assertEqual(case.mode == 'savevm', case.transport == 'disk')
            if case.mode == 'savevm':
                self.assertEqual(capabilities(case), (set(), set()))
                self.assertEqual(case.dirty, '')

    def test_locked_memory_is_there_before(self):
        for case in CASES:
            for block in case.blocks:
                for side, qemu in ((block.source, case.source),
                                   (block.destination, case.destination)):
                    backend = BACKENDS[side.backend]
                    if qemu.locked and not backend.shared and backend.directory is None:
                        self.assertTrue(side.in_process, str(case))

    def test_background_snapshot_goes_alone(self):
        for case in CASES:
            if case.mode == 'background-snapshot':
                self.assertEqual(case.source.capabilities, ('background-snapshot',))
                self.assertEqual(case.dirty, '')

    def test_capabilities_that_need_another(self):
        needs = {'postcopy-preempt': 'postcopy-ram',
                 'postcopy-blocktime': 'postcopy-ram',
                 'switchover-ack': 'return-path',
                 'zero-copy-send': 'multifd'}
        for case in CASES:
            for side in capabilities(case):
                for one, other in needs.items():
                    self.assertFalse(one in side and other not in side, str(case))

    def test_transport(self):
        for case in CASES:
            source = capabilities(case)[0]
            if 'mapped-ram' in source:
                self.assertIn(case.transport, ('file', 'file-offset'))
            elif source & {'multifd', 'postcopy-preempt'}:
                self.assertIn(case.transport, ('tcp', 'unix'))
            if case.to_file:
                self.assertNotIn('return-path', source)
                self.assertNotIn(case.transport, ('tcp', 'unix'))
            else:
                self.assertIn(case.transport, ('tcp', 'unix', 'fd'))

    def test_compression(self):
        for case in CASES:
            method = case.source.parameters.get('multifd-compression', 'none')
            if method != 'none':
                source = capabilities(case)[0]
                self.assertIn('multifd', source)
                self.assertFalse(source & {'mapped-ram', 'zero-copy-send'})

    def test_stock_gets_nothing_new(self):
        for case in CASES:
            stock = STOCK in (case.source.binary, case.destination.binary)
            if stock:
                for side in capabilities(case):
                    self.assertNotIn('sparse-ram', side)
            for side in (case.source, case.destination):
                self.assertTrue(side.holes or side.binary == PATCHED)

    def test_stock_is_not_given_what_it_loses(self):
        for case in CASES:
            if case.destination.binary == STOCK and (
                    case.mode.startswith('mapped-ram') or
                    case.mode == 'multifd' and
                    case.zero_page_detection == 'multifd'):
                for block in case.blocks:
                    self.assertEqual(block.destination.pattern, 'holes')

    def test_backends(self):
        for case in CASES:
            sides = [(block.source, block.destination) for block in case.blocks]
            for one, other in sides:
                kinds = BACKENDS[one.backend], BACKENDS[other.backend]
                if case.postcopy:
                    self.assertNotIn('other', [kind.fs for kind in kinds])
                    self.assertEqual(kinds[0].fs == 'hugetlbfs',
                                     kinds[1].fs == 'hugetlbfs')
                for side, kind in zip((one, other), kinds):
                    if kind.fs is None:
                        self.assertTrue(side.in_process)
            self.assertLessEqual(sum(
                'hugetlb' in one.backend or 'hugetlb' in other.backend
                for one, other in sides), 1, 'there are few huge pages')
            self.assertLessEqual(sum(block.size for block in case.blocks), 64)

    def test_writes_are_known_to_arrive(self):
        for case in CASES:
            self.assertEqual(
                'pause-before-switchover' in case.source.capabilities,
                case.dirty == 'qtest')

    def test_everything_is_drawn(self):
        backends = {side.backend for case in CASES for block in case.blocks
                    for side in (block.source, block.destination)}
        self.assertEqual(backends, set(BACKENDS))
        patterns = {side.pattern for case in CASES for block in case.blocks
                    for side in (block.source, block.destination)}
        self.assertEqual(patterns, set(model.PATTERNS))
        drawn = {name for case in CASES for name in capabilities(case)[0]}
        self.assertLessEqual({
            'multifd', 'xbzrle', 'postcopy-ram', 'postcopy-preempt',
            'postcopy-blocktime', 'release-ram', 'return-path',
            'validate-uuid', 'auto-converge', 'mapped-ram', 'sparse-ram',
            'background-snapshot', 'zero-copy-send', 'switchover-ack',
            'late-block-activate', 'pause-before-switchover'}, drawn)
        self.assertEqual({case.dirty for case in CASES}, {'', 'qtest', 'guest'})
        self.assertEqual({case.transport for case in CASES},
                         {'tcp', 'unix', 'fd', 'file', 'file-offset', 'exec',
                          'disk'})
        sides = [side for case in CASES for side in (case.source, case.destination)]
        self.assertEqual({side.locked for side in sides}, {True, False})
        self.assertIn(TLS, {side.parameters.get('tls-creds') for side in sides})

    def test_describes_itself(self):
        text = str(random_case.draw(17))
        self.assertIn('seed 17:', text)
        self.assertIn('block 0:', text)


class Policy(unittest.TestCase):
    """What may be expected of the destination and the source."""

    def setUp(self):
        base = next(case for case in CASES if case.mode == 'precopy'
                    and case.source.keeps_holes
                    and case.destination.keeps_holes
                    and case.zero_page_detection == 'multifd'
                    and not case.thp)
        self.case = base

    def block(self, source='memfd', destination='memfd', prealloc=False):
        """A block with such backends."""
        block = self.case.blocks[0]
        return replace(
            block,
            source=replace(block.source, backend=source),
            destination=replace(block.destination, backend=destination,
                                prealloc=prealloc))

    def test_destination(self):
        for backend, expected in (
                ('memfd', 'punch'), ('shm', 'punch'), ('shm-file', 'keep'),
                ('shm-file-offset', 'keep'), ('anonymous-shared', 'punch'),
                ('hugetlb', 'keep'), ('anonymous', 'keep'),
                ('memfd-private', 'keep'), ('hugetlb-private', 'any'),
                ('other-file', 'any'), ('other-file-private', 'any')):
            self.assertEqual(random_case.policy(
                self.case, self.block(destination=backend)), expected)
        self.assertEqual(random_case.policy(
            self.case, self.block(prealloc=True)), 'any')

    def test_nothing_is_expected_of_stock(self):
        stock = replace(self.case, destination=replace(
            self.case.destination, binary=STOCK))
        self.assertEqual(random_case.policy(stock, self.block()), 'any')
        locked = replace(self.case, destination=replace(
            self.case.destination, locked=True))
        self.assertEqual(random_case.policy(locked, self.block()), 'any')
        off = replace(self.case, source=replace(self.case.source, holes=False))
        self.assertTrue(random_case.source_reads(off, self.block()))

    def test_source(self):
        for backend, reads in (('memfd', False), ('hugetlb', False),
                               ('anonymous', False), ('memfd-private', True),
                               ('other-file', True)):
            self.assertEqual(random_case.source_reads(
                self.case, self.block(source=backend)), reads)


class Patterns(unittest.TestCase):
    """Which page is what."""

    def test_size_and_kinds(self):
        for name in model.PATTERNS:
            for seed in range(20):
                for pages in (1, 512, 1000, 4096):
                    kinds = model.expand(name, seed, pages, 64)
                    self.assertEqual(len(kinds), pages, name)
                    self.assertLessEqual(set(kinds), {HOLE, ZERO, DATA})

    def test_repeats(self):
        for name in model.PATTERNS:
            self.assertEqual(model.expand(name, 5, 3000, 64),
                             model.expand(name, 5, 3000, 64))

    def test_runs(self):
        kinds = bytes([HOLE, HOLE, DATA, ZERO, ZERO])
        self.assertEqual(list(model.runs_of(kinds)),
                         [(0, 2, HOLE), (2, 3, DATA), (3, 5, ZERO)])


class Models(unittest.TestCase):
    """Content, and where it came from."""

    def setUp(self):
        self.model = BlockModel(bytes([HOLE, ZERO, DATA, DATA]), Content(1))

    def test_content(self):
        zero = bytes(PAGE)
        content = Content(7)
        for page in range(5000):
            self.assertEqual(len(content.page(page)), PAGE)
            self.assertNotEqual(content.page(page), zero)
        self.assertEqual(self.model.content[:2 * PAGE], 2 * zero)
        self.assertEqual(self.model.content[2 * PAGE:3 * PAGE], Content(1).page(2))
        self.assertEqual(list(self.model.nonzero), [0, 0, 1, 1])

    def test_some_pages_are_zero_but_for_a_byte(self):
        content = Content(3)
        single = sum(content.page(page).count(0) == PAGE - 1 for page in range(1000))
        self.assertTrue(50 < single < 300, single)

    def test_write(self):
        self.model.write(PAGE - 4, b'12345678')     # over two pages
        self.assertEqual(list(self.model.nonzero), [1, 1, 1, 1])
        self.model.write(2 * PAGE, bytes(PAGE))
        self.assertEqual(list(self.model.nonzero), [1, 1, 0, 1])
        self.assertEqual(list(self.model.ever), [1, 1, 1, 1])
        self.assertEqual(list(self.model.written), [1, 1, 1, 0])

    def test_copy_is_another(self):
        other = self.model.copy()
        other.write(0, b'x')
        other.touch(PAGE)
        self.assertEqual(list(self.model.written), [0, 0, 0, 0])
        self.assertEqual(list(other.written), [1, 1, 0, 0])
        self.assertEqual(self.model.content[0], 0)

    def test_notices_one_bit(self):
        content = bytearray(self.model.content)
        self.assertEqual(self.model.differing(bytes(content)), [])
        content[3 * PAGE + 77] ^= 1
        self.assertEqual(self.model.differing(bytes(content)), [3])
        content[1 * PAGE + 1] = 1
        self.assertEqual(self.model.differing(bytes(content)), [1, 3])

    def test_zero_instead_of_data(self):
        content = bytes(4 * PAGE)
        self.assertEqual(self.model.differing(content), [2, 3])
        self.assertEqual(self.model.differing(content, [content]), [])
        other = bytearray(content)
        other[2 * PAGE] = 1
        self.assertEqual(self.model.differing(content, [other]), [2])

    def test_another_size(self):
        with self.assertRaises(ValueError):
            self.model.differing(bytes(PAGE))


class Allocation(unittest.TestCase):
    """Where there may be pages."""

    def test_extents(self):
        flags = model.in_extents([(0, PAGE), (3 * PAGE, 5 * PAGE)], 5)
        self.assertEqual(list(flags), [1, 0, 0, 1, 1])

    def test_minus(self):
        self.assertEqual(model.minus(b'\1\1\0', b'\1\0\0'), [1])
        self.assertEqual(model.minus(b'\1\0\0', b'\1\1\1'), [])

    def test_units(self):
        flags = bytearray(12)
        flags[5] = 1
        self.assertEqual(list(model.in_units(flags, 4)), [0] * 4 + [1] * 4 + [0] * 4)
        # Page 0 is the third of its unit
        self.assertEqual(list(model.in_units(flags, 4, 2)), [0] * 2 + [1] * 4 + [0] * 6)

    def test_source_must_not_grow(self):
        before, written = b'\1\0\0', b'\0\1\0'
        allowed = model.allowed_on_source(before, written, True)
        self.assertEqual(model.minus(b'\1\1\1', allowed), [2])
        self.assertIsNone(model.allowed_on_source(before, written, False))

    def test_destination(self):
        block = BlockModel(bytes([HOLE, ZERO, DATA, DATA, HOLE]), Content(1))
        block.write(3 * PAGE, bytes(PAGE))
        block.touch(4 * PAGE)
        block.written[3] = 0        # by the source
        stale = b'\0\1\0\0\0'
        self.assertEqual(list(model.allowed_on_destination(
            block, stale, 'punch')), [0, 0, 1, 0, 1])
        self.assertEqual(list(model.allowed_on_destination(
            block, stale, 'keep')), [0, 1, 1, 1, 1])
        self.assertIsNone(model.allowed_on_destination(block, stale, 'any'))


class Blocks(unittest.TestCase):
    """How RAM blocks are found in a process."""

    def test_info_ramblock(self):
        text = ('              Block Name    PSize              Offset\n'
                '   ram0    2 MiB  0x0000000000000000 0x0000000001200000 '
                '0x0000000001200000 0x00007fe10e5b7000  rw\n'
                '   pc.bios    4 KiB  0x0000000002e00000 0x0000000000040000 '
                '0x0000000000040000 0x00007fe10e400000  ro\n')
        found = parse_blocks(text)
        self.assertEqual(set(found), {'ram0', 'pc.bios'})
        self.assertEqual(found['ram0'], (0x7fe10e5b7000, 0x1200000))

    def test_maps(self):
        mapping = Mapping.parse('7f10-7f20 rw-s 00001000 00:1b 1644    '
                                '/dev/shm/a b (deleted)\n')
        self.assertEqual((mapping.start, mapping.end), (0x7f10, 0x7f20))
        self.assertTrue(mapping.shared)
        self.assertEqual(mapping.offset, 0x1000)
        self.assertEqual(mapping.inode, 1644)
        self.assertEqual(mapping.device, os.makedev(0, 0x1b))
        self.assertEqual(mapping.path, '/dev/shm/a b (deleted)')

    def test_anonymous(self):
        mapping = Mapping.parse('7f10-7f20 rw-p 00000000 00:00 0 \n')
        self.assertEqual((mapping.inode, mapping.path), (0, ''))

    def test_file_of_mapping(self):
        """Also where there are two numbers for a device, as on btrfs."""
        def is_of(device: int, inode: int, link: str) -> bool:
            status = os.stat_result((0o100600, inode, device, 1, 0, 0, 0, 0, 0, 0))
            return Mapping.parse('7f10-7f20 rw-s 00000000 00:1b 42 /tmp/a b\n'
                                 ).is_of(status, link)

        device = os.makedev(0, 0x1b)
        self.assertTrue(is_of(device, 42, '/tmp/a b'))
        self.assertTrue(is_of(device, 42, '/elsewhere'))
        self.assertTrue(is_of(device + 1, 42, '/tmp/a b'))
        self.assertFalse(is_of(device + 1, 42, '/tmp/b'))
        self.assertFalse(is_of(device, 43, '/tmp/a b'))


class Random(unittest.TestCase):
    """What replaying a seed stands on."""

    def test_generator(self):
        """If Python's generator changes, seeds in reports mean nothing."""
        rng = random.Random(1)
        self.assertEqual([rng.randrange(1000) for _ in range(4)], [137, 582, 867, 821])
