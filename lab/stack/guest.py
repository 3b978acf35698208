# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest: Debian's kernel, busybox, and loads that check what they read."""

import os
import re
import time
from typing import Dict, Sequence, Tuple

from lab.guest.linux import (DISK_MODULES, GUEST, LOAD_SOURCE, Console, compiled,
                             initramfs, modules)
from lab.outcome import Wrong, expect

BOOT_TIMEOUT = 600
CHECK_TIMEOUT = 60

IO_LOAD_SOURCE = os.path.join(os.path.dirname(__file__), 'io-load.c')

_MODULES = (*DISK_MODULES, 'fuse', 'virtiofs', 'virtio_balloon')

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


def make_initramfs(path: str, init: str = _INIT, names: Sequence[str] = _MODULES,
                   directories: Sequence[str] = ('share',),
                   tools: Sequence[str] = ('insmod',)) -> None:
    """Write an initramfs with the loads for memory and files.

    init: the script, in which {modules} stands for what has to be loaded.
    names: modules of the kernel.
    directories: to make; tools: of busybox.
    """
    drivers = modules(f'{GUEST}/kernel', names)
    with open(path, 'wb') as file:
        file.write(initramfs(
            GUEST, init.format(modules=' '.join(drivers)),
            {'io-load': compiled(IO_LOAD_SOURCE, f'{GUEST}/io-load'),
             'guest-load': compiled(LOAD_SOURCE, f'{GUEST}/guest-load'),
             **drivers}, directories, tools))


def wait_for_boot(console: IoConsole, targets: int) -> float:
    """Wait until all loads are at work; returns the seconds that it took.

    targets: how many files io-load has to be at work with.
    """
    started = time.monotonic()
    while len(console.checked) < targets or not all(console.checked.values()):
        expect(not console.trouble(), f'the guest says: {console.trouble()}')
        expect(time.monotonic() < started + BOOT_TIMEOUT,
               f'the guest has not booted within {BOOT_TIMEOUT} seconds')
        time.sleep(0.1)
    check(console, targets)
    return time.monotonic() - started


def check(console: IoConsole, targets: int) -> str:
    """Wait until each load has made progress; returns what is to be said of it.

    targets: as for wait_for_boot().
    """
    before = dict(console.checked)
    reports = console.reports()
    if not console.wait_for_reports(4, CHECK_TIMEOUT):
        raise Wrong(f'the guest says: {console.trouble() or "nothing more"}')
    after = dict(console.checked)
    written = console.reports()[-1].written
    expect(len(after) == targets, f'io-load is at work with {sorted(after)}')
    for name, count in after.items():
        expect(count > before.get(name, 0), f'the {name} of the guest stands still')
    expect(not reports or written > reports[-1].written,
           'the memory of the guest stands still')
    return 'ok'
