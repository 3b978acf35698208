# SPDX-License-Identifier: GPL-2.0-or-later
"""A real guest: Debian's kernel, busybox, and a load that checks its memory.

The load is lab/guest/guest-load.c.  Nothing is stored: kernel and busybox are
fetched by scripts/get-guest, the initramfs is made when it is needed.
"""

import glob
import gzip
import lzma
import os
import re
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from lab import UserError
from lab.base import ROOT
from lab.memory import KIB, PAGE_SIZE
from lab.outcome import Unavailable
from lab.ram import Ram

GUEST = os.path.join(ROOT, 'build/guest')
GET_GUEST = os.path.join(ROOT, 'scripts/get-guest')
LOAD_SOURCE = os.path.join(ROOT, 'lab/guest/guest-load.c')

_UNAVAILABLE = 77               # exit status of get-guest

# In the order in which they can be loaded; a kernel may have some built in
VIRTIO_MODULES = ('virtio_ring', 'virtio', 'virtio_pci_legacy_dev',
                  'virtio_pci_modern_dev', 'virtio_pci')
DISK_MODULES = (*VIRTIO_MODULES, 'virtio_blk')
_MODULES = (*VIRTIO_MODULES, 'virtio_balloon', 'rng-core', 'virtio-rng')

# init_on_alloc would fill what the guest has freed with zeroes, as soon as it
# is used again, and so hide that it was populated
COMMAND_LINE = ('console=ttyS0 quiet panic=-1 init_on_alloc=0 '
                'transparent_hugepage=never')

_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for module in {modules}; do
    insmod "/$module"
done
/guest-load {workers} {mib} {pages}
echo "load: ERROR guest-load has ended"
"""

# What Linux says when something is wrong with its memory.  Not: that it was not
# scheduled for a while.
_TROUBLE = re.compile(r'Kernel panic|Oops|general protection|segfault|'
                      r'BUG: (?!soft lockup|workqueue)|Bad page|'
                      r'load: ERROR|Out of memory')

_PROGRESS = re.compile(r'load: (\d+) s, (\d+) written, (\d+) checked, '
                       r'(\d+) freed, (\d+) KiB MemFree, (\d+) errors, end')


# The initramfs

def cpio_entry(name: str, mode: int, data: bytes = b'',
               device: Tuple[int, int] = (0, 0)) -> bytes:
    """A file in an archive of the kind that Linux takes as its initramfs.

    mode: as in stat(2), with the type; device: major, minor of a device file.
    The format is in Documentation/driver-api/early-userspace/buffer-format.rst
    """
    encoded = name.encode('ascii') + b'\0'
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = b'070701' + b''.join(b'%08X' % field for field in fields)
    return _aligned(header + encoded) + _aligned(data)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def cpio_archive(entries: Sequence[bytes]) -> bytes:
    """An archive of cpio_entry()s."""
    return b''.join([*entries, cpio_entry('TRAILER!!!', 0)])


def read_file(path: str) -> bytes:
    """All of it."""
    with open(path, 'rb') as file:
        return file.read()


@dataclass(frozen=True)
class Load:
    """What runs in the guest: the arguments of guest-load.

    mib: the most memory, of which half is used on average.
    pages: that each worker writes to in a second.
    """
    workers: int = 2
    mib: int = 512
    pages: int = 2000


def _lib_modules(package: str) -> str:
    """Where an unpacked kernel has its modules: below usr since Debian 13."""
    found = glob.glob(f'{package}/lib/modules/*') + glob.glob(
        f'{package}/usr/lib/modules/*')
    if len(found) != 1:
        raise UserError(f'{package} has modules of {len(found)} kernels instead '
                        'of one')
    return found[0]


def _read_module(path: str) -> bytes:
    return lzma.open(path).read() if path.endswith('.xz') else read_file(path)


def modules(package: str, names: Sequence[str]) -> Dict[str, bytes]:
    """Name in the initramfs and content of those modules that the unpacked
    kernel has; the others have to be built in.
    """
    directory = _lib_modules(package)
    with open(f'{directory}/modules.builtin', encoding='utf-8') as file:
        builtin = {os.path.basename(line)[:-len('.ko\n')].replace('-', '_')
                   for line in file}
    found = {}
    for name in names:
        paths = glob.glob(f'{directory}/kernel/**/{name}.ko*', recursive=True)
        if paths:
            found[f'{name}.ko'] = _read_module(paths[0])
        elif name.replace('-', '_') not in builtin:
            raise UserError(f'{directory} has no module {name}')
    return found


def kernel(guest: str) -> str:
    """The one that get-guest has unpacked: not in boot since Linux 7."""
    found = glob.glob(f'{guest}/kernel/boot/vmlinuz-*') + glob.glob(
        f'{guest}/kernel/usr/lib/modules/*/vmlinuz')
    if len(found) != 1:
        raise UserError(f'{guest}/kernel has {len(found)} kernels instead of '
                        f'one: remove {guest}')
    return found[0]


def busybox(guest: str) -> bytes:
    """The program: below usr since Debian 13."""
    return read_file(next(path for path in (f'{guest}/busybox/bin/busybox',
                                            f'{guest}/busybox/usr/bin/busybox')
                          if os.path.exists(path)))


def compiled(source: str, program: str) -> bytes:
    """A program of C, linked statically; program: where it is made."""
    try:
        subprocess.run([os.environ.get('CC', 'gcc'), '-static', '-O2', '-Wall',
                        '-o', program, source], check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise UserError(f'{source} could not be compiled: {err}') from err
    return read_file(program)


def initramfs(guest: str, init: str, files: Dict[str, bytes],
              directories: Sequence[str] = (), tools: Sequence[str] = ()) -> bytes:
    """What Linux unpacks, with busybox and a few of its tools.

    guest: where its busybox is; init: a script for its shell.
    files: executable ones, by path.
    directories: besides the usual ones, those of files in front.
    """
    return gzip.compress(cpio_archive([
        *(cpio_entry(name, 0o040755)
          for name in ('dev', 'proc', 'sys', 'bin', *directories)),
        cpio_entry('dev/console', 0o020600, device=(5, 1)),
        cpio_entry('bin/busybox', 0o100755, busybox(guest)),
        *(cpio_entry(f'bin/{name}', 0o120777, b'busybox')
          for name in ('sh', 'mount', *tools)),
        cpio_entry('init', 0o100755, init.encode('ascii')),
        *(cpio_entry(name, 0o100755, data) for name, data in files.items())]),
        compresslevel=1)


def _make_initramfs(path: str, load: Load) -> None:
    program = compiled(LOAD_SOURCE, f'{GUEST}/guest-load')
    drivers = modules(f'{GUEST}/kernel', _MODULES)
    init = _INIT.format(modules=' '.join(drivers), workers=load.workers,
                        mib=load.mib, pages=load.pages)
    with open(path, 'wb') as file:
        file.write(initramfs(GUEST, init, {'guest-load': program, **drivers},
                             tools=('insmod',)))


def fetch() -> None:
    """Fetch kernel and busybox.  Raises Unavailable, or UserError."""
    result = subprocess.run([GET_GUEST], stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode == _UNAVAILABLE:
        raise Unavailable(result.stderr.strip().rpartition('\n')[2])
    if result.returncode:
        raise UserError(result.stderr.strip())


def prepare(load: Load, directory: str) -> List[str]:
    """Make the guest; returns QEMU's options for it.

    directory: for the initramfs, as long as QEMUs are started.
    Raises Unavailable, or UserError.
    """
    fetch()
    initramfs = os.path.join(directory, 'initramfs')
    _make_initramfs(initramfs, load)
    return ['-kernel', kernel(GUEST), '-initrd', initramfs, '-append', COMMAND_LINE]


# Losing writes on purpose

# Words of a page, see write_page() in guest-load.c: in a row, each is the one
# before it plus one
_SOME_WORDS = struct.Struct('<4Q')


def _is_of_load(page: bytes) -> bool:
    _, first, second, third = _SOME_WORDS.unpack_from(page)
    return first != 0 and (first + 1, first + 2) == (second, third)


def lose_writes(ram: Ram, pages: int) -> int:
    """Make pages of the load zero, as if what was written had got lost.

    Some of them may be freed already.  Returns how many there were, at most
    pages.
    """
    lost = 0
    with ram.opened() as fd:
        for start, end in ram.extents():
            for offset in range(start, end, PAGE_SIZE):
                if not _is_of_load(os.pread(fd, PAGE_SIZE, ram.base + offset)):
                    continue
                os.pwrite(fd, bytes(PAGE_SIZE), ram.base + offset)
                lost += 1
                if lost == pages:
                    return lost
    return lost


# Its console

@dataclass(frozen=True)
class Progress:
    """What the load has done so far.  free: bytes of RAM that Linux has not
    given to anybody.
    """
    written: int
    checked: int
    freed: int
    free: int
    errors: int


def parse_progress(line: str) -> Optional[Progress]:
    """A line of the load; None if it is another one, or cut off."""
    match = _PROGRESS.search(line)
    if not match:
        return None
    return Progress(written=int(match[2]), checked=int(match[3]),
                    freed=int(match[4]), free=int(match[5]) * KIB,
                    errors=int(match[6]))


def is_trouble(line: str) -> bool:
    """Whether a line of the console says that something is wrong."""
    progress = parse_progress(line)
    return bool(_TROUBLE.search(line) or (progress and progress.errors))


class Console:
    """Everything that the guest says, on whichever QEMU it is.

    A line that the guest was at when it moved is cut in two; those that
    matter are said again.
    """

    def __init__(self, log: str):
        """log: a file for all of it"""
        with open(log, 'w', encoding='utf-8'):
            pass
        self._lock = threading.Lock()
        self._log = log
        self._progress: List[Progress] = []
        self._trouble: List[str] = []

    def attach(self, path: str) -> None:
        """Read from a socket, until it is closed."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with connection, connection.makefile(
                'r', encoding='utf-8', errors='replace') as lines:
            try:
                for line in lines:
                    self._add(line.rstrip())
            except OSError:         # QEMU was killed
                pass

    def _add(self, line: str) -> None:
        progress = parse_progress(line)
        with self._lock:
            with open(self._log, 'a', encoding='utf-8') as log:
                log.write(line + '\n')
            if progress:
                self._progress.append(progress)
            if is_trouble(line):
                self._trouble.append(line)

    def reports(self) -> List[Progress]:
        """What the load has said until now."""
        with self._lock:
            return list(self._progress)

    def trouble(self) -> Optional[str]:
        """The first line that says that something is wrong."""
        with self._lock:
            return self._trouble[0] if self._trouble else None

    def wait_for_reports(self, more: int, timeout: float) -> bool:
        """Whether this many reports came within so many seconds."""
        deadline = time.monotonic() + timeout
        goal = len(self.reports()) + more
        while len(self.reports()) < goal and not self.trouble():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True
