# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest on one host: QEMU, in its sandbox, and the processes that serve it."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import List, Optional

from .common import Failure
from .guest import COMMAND_LINE
from .hosts import SHARED, Host
from .qmp import Qmp

SANDBOX = ('on,obsolete=deny,elevateprivileges=deny,spawn=deny,'
           'resourcecontrol=deny')

DISK = f'{SHARED}/disk.img'
DIRECTORY = f'{SHARED}/directory'
KERNEL = f'{SHARED}/vmlinuz'
INITRAMFS = f'{SHARED}/initramfs'

_QMP_TIMEOUT = 60


@dataclass(frozen=True)
class Kind:
    """What a guest is made of."""
    size: int
    accelerator: str
    vhost_user: bool
    machine: str = 'pc-q35-10.0'

    @property
    def targets(self) -> int:
        """Files that its io-load is at work with."""
        return 2 if self.vhost_user else 1


def _wait_for(path: str, process: 'subprocess.Popen[bytes]') -> None:
    deadline = time.monotonic() + 20
    while not os.path.exists(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure(f'{path} is not there: {process.args!r} has failed')
        time.sleep(0.02)


def serve_disk(host: Host, path: str) -> 'subprocess.Popen[bytes]':
    """Let a qemu-storage-daemon serve DISK at a socket of the host."""
    if os.path.exists(host.path(path)):
        os.unlink(host.path(path))
    daemon = host.start('qemu-storage-daemon', [
        '/usr/bin/qemu-storage-daemon', '--blockdev',
        f'file,node-name=disk,filename={DISK},locking=off,cache.direct=on',
        '--export', 'vhost-user-blk,id=export,node-name=disk,writable=on,'
        f'num-queues=4,addr.type=unix,addr.path={path}'])
    _wait_for(host.path(path), daemon)
    return daemon


def memory_file(pid: int) -> Optional[str]:
    """The file that is a QEMU's guest RAM."""
    directory = f'/proc/{pid}/fd'
    for name in os.listdir(directory):
        path = f'{directory}/{name}'
        try:
            if 'memfd:' in os.readlink(path) and 'memory-backend' in os.readlink(path):
                return path
        except FileNotFoundError:
            pass
    return None


def allocated(pid: int) -> int:
    """Bytes of guest RAM that are allocated."""
    path = memory_file(pid)
    if path is None:
        raise Failure(f'process {pid} has no guest RAM in a memfd')
    return os.stat(path).st_blocks * 512


class Vm:
    """A QEMU and its backends, each a process of its own."""

    _count = 0

    def __init__(self, host: Host, binary: str, kind: Kind,
                 incoming: bool) -> None:
        Vm._count += 1
        self.host, self.binary = host, binary
        self._directory = f'/run/stack/{Vm._count}'
        os.makedirs(host.path(self._directory))
        self._processes: List['subprocess.Popen[bytes]'] = []
        options = self._serve_disk_and_directory() if kind.vhost_user else [
            '-blockdev', f'file,node-name=disk,filename={DISK},locking=off,'
            'cache.direct=on,aio=native', '-device',
            'virtio-blk-pci,drive=disk,share-rw=on']
        self._qemu = self._start('qemu', [
            binary, '-nodefaults', '-display', 'none', '-no-user-config',
            '-sandbox', SANDBOX, '-accel', kind.accelerator, '-smp', '2',
            '-m', f'{kind.size}B', '-object', 'memory-backend-memfd,id=mem,'
            f'size={kind.size}B,share=on',
            '-machine', f'{kind.machine},memory-backend=mem',
            '-kernel', KERNEL, '-initrd', INITRAMFS, '-append', COMMAND_LINE,
            '-qmp', self._server('qmp'),
            '-chardev', f'socket,id=serial,path={self._directory}/serial,'
            'server=on,wait=off', '-serial', 'chardev:serial',
            '-device', 'virtio-balloon-pci,free-page-reporting=on',
            *options, *(('-incoming', 'defer') if incoming else ())])
        _wait_for(self.path('qmp'), self._qemu)
        self.qmp = Qmp(self.path('qmp'), _QMP_TIMEOUT)

    def path(self, name: str) -> str:
        """A socket of this guest, as we see it."""
        return self.host.path(f'{self._directory}/{name}')

    @property
    def pid(self) -> int:
        """QEMU's, to which chroot has become."""
        return self._qemu.pid

    def allocated(self) -> int:
        """Bytes of guest RAM that are allocated."""
        return allocated(self.pid)

    def _server(self, name: str) -> str:
        return f'unix:{self._directory}/{name},server=on,wait=off'

    def _start(self, name: str, words: List[str]) -> 'subprocess.Popen[bytes]':
        process = self.host.start(name, words)
        self._processes.append(process)
        return process

    def _serve_disk_and_directory(self) -> List[str]:
        """Start qemu-storage-daemon and virtiofsd; returns QEMU's options."""
        disk, share = (f'{self._directory}/{name}' for name in ('disk', 'fs'))
        self._processes.append(serve_disk(self.host, disk))
        virtiofsd = self._start('virtiofsd', [
            '/usr/libexec/virtiofsd', f'--socket-path={share}',
            f'--shared-dir={DIRECTORY}'])
        _wait_for(self.path('fs'), virtiofsd)
        return ['-chardev', f'socket,id=disk,path={disk}',
                '-device', 'vhost-user-blk-pci,chardev=disk,num-queues=1',
                '-chardev', f'socket,id=fs,path={share}',
                '-device', 'vhost-user-fs-pci,chardev=fs,tag=share']

    def end(self) -> None:
        """Kill all of it."""
        self.qmp.close()
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
