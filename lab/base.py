# SPDX-License-Identifier: GPL-2.0-or-later
"""The base, which is the QEMU series to work with, and where it lies."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def chosen_base() -> str:
    """The base that $BASE names, or the default; scripts/lib.sh checks it."""
    with open(os.path.join(ROOT, 'patches/default'), encoding='utf-8') as file:
        return os.environ.get('BASE') or file.read().strip()


BASE = chosen_base()
BUILD = os.path.join(ROOT, 'build', BASE)
PATCHES = os.path.join(ROOT, 'patches', BASE)
