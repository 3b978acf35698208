# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate a real guest whose disk a vhost-user backend serves, with postcopy.

The backend is qemu-storage-daemon: in postcopy, its accesses to guest RAM are
page faults that QEMU answers.  Debian's kernel, with a load that checks what it
reads from a disk and one that checks its memory, moves from one QEMU to the next,
each with a daemon of its own, plain and with postcopy-preempt.  While it moves, it
reads all of another disk, into memory that it has not used before: the daemon has
to wait for zero pages then, and nobody else does.  RAM must not fill up, nothing
may be wrong with what is read, and all has to end.

Exit status: 0 if all is as it should be; 1 if not; 2 for a mistake on the
command line or something missing; 77 if there is no kernel or not enough memory.
"""

import argparse
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from typing import Dict, List, Sequence, Tuple

from lab.base import BUILD
from lab.cli import memory_floor, run_main, say
from lab.guest.linux import COMMAND_LINE, DISK_MODULES, GUEST, fetch, kernel
from lab.measure.operation import Migrate, Session, Times
from lab.measure.report import mib, rst_table
from lab.memory import MIB
from lab.migrate import MigrationFailed, clear_capabilities, listen, watched
from lab.modes import MODES
from lab.outcome import Unavailable, Wrong, expect
from lab.qemu import Guest, GuestError, import_qemu, pick_accelerator
from lab.stack.guest import IoConsole, check, make_initramfs, wait_for_boot

SKIPPED = 77

# Enough for RAM below and above 4 GiB, which are regions of their own
SIZE = 4096 * MIB

DISK_SIZE = 64 * MIB

# What is read while the guest moves
FILE_SIZE = 256 * MIB

# A line on the console has the file read
_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in {modules}; do
    insmod "/$module"
done
/io-load disk /dev/vda &
/guest-load 1 64 1000 &
while read line; do
    echo "read: $line $(md5sum </dev/vdb)"
    echo 3 >/proc/sys/vm/drop_caches
done
"""

_READ = re.compile(r'read: (\w+) ([0-9a-f]{32})')

# Slow enough for both loads to wait for pages
POSTCOPY_BANDWIDTH = 16 * MIB

# What a side may have more than the source had: the guest runs on meanwhile
MARGIN = 128 * MIB

HOP_TIMEOUT = 240

# How long the channel works before it breaks, and how long it is broken, in
# seconds
BREAK = 3

HOPS = ('postcopy', 'preempt', 'sparse-ram-preempt', 'recover', 'preempt')

QEMU = f'{BUILD}/patched/qemu-system-x86_64'
DAEMON = f'{BUILD}/patched/storage-daemon/qemu-storage-daemon'

LOG = os.path.join(BUILD, 'logs/disk-console.log')


class DiskConsole(IoConsole):
    """The guest's console, with what was read of the file."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.sums: Dict[str, str] = {}
        self._connections: Dict[str, socket.socket] = {}

    def attach(self, path: str) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        self._connections[path] = connection
        threading.Thread(target=self._read, args=(connection,),
                         daemon=True).start()

    def type(self, path: str, line: str) -> None:
        """Let the guest read a line, on the QEMU that has this socket."""
        self._connections[path].sendall(f'{line}\n'.encode('ascii'))

    def _add(self, line: str) -> None:
        match = _READ.search(line)
        if match:
            self.sums[match[1]] = match[2]
        super()._add(line)


class Daemon:
    """A qemu-storage-daemon that serves files, each at a socket."""

    def __init__(self, binary: str, disks: Sequence[Tuple[str, str]]) -> None:
        """disks: file and socket of each"""
        options = []
        for number, (disk, path) in enumerate(disks):
            options += [
                '--blockdev', f'file,node-name=disk{number},filename={disk},'
                'locking=off', '--export', f'vhost-user-blk,id=export{number},'
                f'node-name=disk{number},writable=on,num-queues=1,'
                f'addr.type=unix,addr.path={path}']
        self._process = subprocess.Popen([binary, *options],
                                         stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not all(os.path.exists(path) for _, path in disks):
            expect(self._process.poll() is None and time.monotonic() < deadline,
                   f'{binary} does not serve {disks}')
            time.sleep(0.02)

    def __enter__(self) -> 'Daemon':
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Vm(Guest):
    """A QEMU and its daemon."""

    def __init__(self, name: str, args: argparse.Namespace, directory: str,
                 incoming: bool) -> None:
        self._daemon_binary = args.daemon
        self._disks = [(f'{directory}/{disk}', f'{directory}/{name}.{disk}')
                       for disk in ('disk', 'file')]
        devices: List[str] = []
        for number, (_, path) in enumerate(self._disks):
            devices += ['-chardev', f'socket,id=disk{number},path={path}',
                        '-device', 'vhost-user-blk-pci,num-queues=1,'
                        f'chardev=disk{number}']
        self.serial = f'{directory}/{name}.serial'
        self._stack = ExitStack()
        super().__init__(
            name, args.qemu, SIZE, accel=args.accel or pick_accelerator(),
            incoming=incoming, extra_args=(
                '-smp', '2', '-kernel', kernel(GUEST),
                '-initrd', f'{directory}/initramfs', '-append', COMMAND_LINE,
                '-chardev', f'socket,id=serial,path={self.serial},server=on,'
                'wait=off', '-serial', 'chardev:serial',
                '-device', 'virtio-balloon-pci,free-page-reporting=on',
                *devices, *args.extra))

    def _start(self) -> None:
        self._stack.enter_context(
            Daemon(self._daemon_binary, self._disks))
        super()._start()

    def __exit__(self, *exc: object) -> None:
        if self._vm:
            sys.stderr.write(self.end())
        super().__exit__(*exc)
        self._stack.close()

    def allocated(self) -> int:
        """Bytes of guest RAM that are allocated."""
        return self.ram.allocated() or 0


class _Broken(Migrate):
    """A migration whose channel breaks, and is recovered."""

    def _through_loopback(self, session: Session, source: Guest,
                          destination: Guest) -> Times:
        def wait_for(status: str) -> None:
            session.wait_until(lambda: all(
                each.query_migrate()['status'] == status
                for each in (source, destination)))

        started = time.monotonic()
        source.qmp('migrate', uri=listen(destination))
        assert self.meanwhile
        self.meanwhile(session)
        source.qmp('migrate-start-postcopy')
        wait_for('postcopy-active')
        time.sleep(BREAK)
        source.qmp('migrate-pause')
        wait_for('postcopy-paused')
        time.sleep(BREAK)
        assert isinstance(destination, Vm)
        uri = f'unix:{destination.serial}.recover'
        destination.qmp('migrate-recover', uri=uri)
        source.qmp('migrate', uri=uri, resume=True)
        wait_for('completed')
        total = time.monotonic() - started
        return Times(total, total)


def _wait_until_free(vm: Vm) -> None:
    """Wait until the guest has reported what it has freed."""
    deadline = time.monotonic() + 30
    while vm.allocated() > FILE_SIZE // 2 and time.monotonic() < deadline:
        time.sleep(0.2)


def hop(number: int, name: str, source: Vm, destination: Vm,
        console: DiskConsole, want: str) -> List[str]:
    """One migration; returns a row of the table."""
    _wait_until_free(source)
    mode = MODES['preempt' if name == 'recover' else name].also(
        max_postcopy_bandwidth=POSTCOPY_BANDWIDTH)
    clear_capabilities(source)
    before = source.allocated()
    with watched((source, destination), memory_floor(),
                 HOP_TIMEOUT) as watchdog:
        session = Session(source, destination, watchdog, '')
        times = (_Broken if name == 'recover' else Migrate)(
            mode, lambda _: console.type(source.serial, f'hop{number}')
        ).run(session)
    after, there = source.allocated(), destination.allocated()
    resident = destination.sample()
    said = check(console, 1)
    deadline = time.monotonic() + 600
    while f'hop{number}' not in console.sums:
        expect(time.monotonic() < deadline, 'the file is not being read')
        time.sleep(0.1)
    expect(console.sums[f'hop{number}'] == want, 'the file was read wrong')
    say(f'{number} {name}: {times.wall:.1f} s, source {mib(before)} -> '
        f'{mib(after)}, destination {mib(there)} -> '
        f'{mib(destination.allocated())} MiB, {resident}: {said}')
    expect(there < before + FILE_SIZE + MARGIN, 'the destination has filled up')
    expect(after < before + FILE_SIZE + MARGIN, 'the source has filled up')
    return [name, f'{times.wall:.1f}', f'{mib(before)} -> {mib(after)}',
            mib(there), said]


def run(args: argparse.Namespace, directory: str) -> List[Sequence[str]]:
    """All hops; returns the rows of the table."""
    make_initramfs(f'{directory}/initramfs', _INIT, (*DISK_MODULES, 'virtio_balloon'),
                   (), ('insmod', 'md5sum'))
    with open(f'{directory}/disk', 'wb') as file:
        file.truncate(DISK_SIZE)
    want = hashlib.md5()
    with open(f'{directory}/file', 'wb') as file:
        for _ in range(FILE_SIZE // MIB):
            data = os.urandom(MIB)
            want.update(data)
            file.write(data)
    console = DiskConsole(LOG)
    rows: List[Sequence[str]] = []
    with ExitStack() as stack:
        current = stack.enter_context(Vm('vm0', args, directory, False))
        console.attach(current.serial)
        say(f'booted in {wait_for_boot(console, 1):.0f} seconds')
        for number, name in enumerate(args.modes or HOPS, 1):
            following = stack.enter_context(
                Vm(f'vm{number}', args, directory, True))
            console.attach(following.serial)
            rows.append(hop(number, name, current, following, console,
                            want.hexdigest()))
            current.__exit__()
            current = following
    return rows


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog='python3 -m lab.guest.disk',
                                     description=__doc__.split('\n\n', 1)[0])
    parser.add_argument('--qemu', default=QEMU)
    parser.add_argument('--daemon', default=DAEMON,
                        help='qemu-storage-daemon')
    parser.add_argument('--accel', choices=('kvm', 'tcg'))
    parser.add_argument('--mode', action='append', dest='modes',
                        help='instead of all (can be repeated)')
    parser.add_argument('--extra', action='append', default=[],
                        help='one more option for QEMU (can be repeated)')
    return parser.parse_args()


def main() -> int:
    """Returns the exit status."""
    args = parse_args()
    import_qemu()
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    try:
        fetch()
        with tempfile.TemporaryDirectory() as directory:
            rows = run(args, directory)
    except Unavailable as err:
        say(f'disk: skipped: {err}')
        return SKIPPED
    except (Wrong, MigrationFailed, GuestError) as err:
        print(f'FAILED: {err}')
        return 1
    print(rst_table(('mode', 'seconds', 'source, MiB', 'destination, MiB',
                     'guest'), rows))
    return 0


if __name__ == '__main__':
    sys.exit(run_main('disk', main))
