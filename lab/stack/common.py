# SPDX-License-Identifier: GPL-2.0-or-later
"""What is taken from elsewhere in this project, in one place."""

from lab import UserError
from lab.base import BASE, BUILD, ROOT
from lab.guest.linux import (GUEST, Console, busybox, cpio_archive, cpio_entry,
                             kernel, modules)
from lab.measure.report import mib, rst_table
from lab.memory import MIB, format_size
from lab.qemu import pick_accelerator

__all__ = ['BASE', 'BUILD', 'GUEST', 'MIB', 'ROOT', 'Console', 'Failure',
           'UserError', 'busybox', 'cpio_archive', 'cpio_entry', 'format_size',
           'kernel', 'mib', 'modules', 'pick_accelerator', 'rst_table']


class Failure(Exception):
    """A check that failed; says which."""
