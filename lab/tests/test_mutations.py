# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that scripts/mutations fits the code that it is to break."""

import glob
import os
import subprocess
import unittest

from lab.base import BUILD, ROOT

SOURCE = os.path.join(BUILD, 'patched-src')


class Mutations(unittest.TestCase):
    """What make check-mutations applies, in the same way."""

    def test_apply(self) -> None:
        """All of them, without fuzz, to the patched tree."""
        if not os.path.isdir(SOURCE):
            self.skipTest('there is no patched tree yet (make qemu)')
        patches = glob.glob(f'{ROOT}/scripts/mutations/*.patch')
        self.assertTrue(patches)
        for path in patches:
            with self.subTest(os.path.basename(path)), \
                    open(path, encoding='utf-8') as patch:
                result = subprocess.run(
                    ['patch', '-p1', '--dry-run', '--fuzz=0', '--forward',
                     '--batch', '-d', SOURCE], stdin=patch, check=False,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    text=True)
                self.assertEqual(result.returncode, 0, result.stdout)
