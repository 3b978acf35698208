# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest: Debian's kernel, busybox, and loads that check what they read."""

import gzip
import os
import re
import subprocess
from typing import Dict, List, Tuple

from .common import (GUEST, ROOT, Console, Failure, UserError, busybox,
                     cpio_archive, cpio_entry, modules)

# In the order in which they can be loaded; a kernel may have some built in
_MODULES = ('virtio_ring', 'virtio', 'virtio_pci_legacy_dev',
            'virtio_pci_modern_dev', 'virtio_pci', 'virtio_blk', 'fuse',
            'virtiofs', 'virtio_balloon')

COMMAND_LINE = ('console=ttyS0 quiet panic=-1 init_on_alloc=0 '
                'transparent_hugepage=never')

_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in {modules}; do
    insmod "/$module"
done
set --
[ ! -b /dev/vda ] || set -- "$@" disk /dev/vda
! mount -t virtiofs share /share || set -- "$@" directory /share/file
/io-load "$@" &
/guest-load 1 64 1000
echo "load: ERROR guest-load has ended"
"""

_IO = re.compile(r'io: \d+ s, (.*), end')


class IoConsole(Console):
    """The guest's console, with what io-load says."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.checked: Dict[str, int] = {}

    def _add(self, line: str) -> None:
        match = _IO.search(line)
        if match:
            self.checked = dict(self._target(each)
                                for each in match[1].split(', '))
        super()._add(line)

    @staticmethod
    def _target(text: str) -> Tuple[str, int]:
        name, checked = text.split()
        return name, int(checked)


def _compile(source: str, program: str) -> bytes:
    result = subprocess.run(
        [os.environ.get('CC', 'gcc'), '-static', '-O2', '-o', program, source],
        check=False, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise UserError(f'{source} could not be compiled: {result.stderr}')
    with open(program, 'rb') as file:
        return file.read()


def _load_sources() -> List[str]:
    here = os.path.dirname(os.path.abspath(__file__))
    return [os.path.join(here, 'io-load.c'),
            os.path.join(ROOT, 'lab/guest/guest-load.c')]


def make_initramfs(path: str) -> None:
    """Write it."""
    drivers = modules(f'{GUEST}/kernel', _MODULES)
    init = _INIT.format(modules=' '.join(drivers))
    entries = [cpio_entry(name, 0o040755)
               for name in ('dev', 'proc', 'sys', 'bin', 'share')]
    entries += [cpio_entry('dev/console', 0o020600, device=(5, 1)),
                cpio_entry('bin/busybox', 0o100755, busybox(GUEST)),
                cpio_entry('init', 0o100755, init.encode('ascii'))]
    entries += [cpio_entry(f'bin/{name}', 0o120777, b'busybox')
                for name in ('sh', 'mount', 'insmod')]
    for source in _load_sources():
        name = os.path.basename(source)[:-len('.c')]
        entries += [cpio_entry(name, 0o100755,
                               _compile(source, f'{GUEST}/{name}'))]
    entries += [cpio_entry(name, 0o100644, data)
                for name, data in drivers.items()]
    with open(path, 'wb') as file:
        file.write(gzip.compress(cpio_archive(entries), compresslevel=1))


def check(console: IoConsole, targets: int, seconds: float) -> str:
    """Wait until each load has made progress; returns what was checked since.

    targets: how many files io-load has to be at work with.
    """
    before = dict(console.checked)
    reports = console.reports()
    if not console.wait_for_reports(4, seconds):
        raise Failure(f'the guest says: {console.trouble() or "nothing more"}')
    after = dict(console.checked)
    written = console.reports()[-1].written
    if len(after) != targets:
        raise Failure(f'io-load is at work with {sorted(after)}')
    for name, count in after.items():
        if count <= before.get(name, 0):
            raise Failure(f'the {name} of the guest stands still')
    if reports and written <= reports[-1].written:
        raise Failure('the memory of the guest stands still')
    return 'ok'
