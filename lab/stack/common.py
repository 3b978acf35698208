# SPDX-License-Identifier: GPL-2.0-or-later
"""What is taken from elsewhere in this project, in one place."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(
    os.path.dirname(os.path.abspath(__file__)))), 'scripts'))

# pylint: disable=wrong-import-position,unused-import
from sparseram import UserError                         # noqa: E402,F401
from sparseram.base import BASE, BUILD, ROOT            # noqa: E402,F401
from sparseram.guest import pick_accelerator            # noqa: E402,F401
from sparseram.memory import MIB, format_size           # noqa: E402,F401
from sparseram.realguest import (GUEST, Console,        # noqa: E402,F401
                                 busybox, cpio_archive, cpio_entry, kernel,
                                 modules)
from sparseram.report import mib, rst_table             # noqa: E402,F401


class Failure(Exception):
    """A check that failed; says which."""
