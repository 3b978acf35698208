# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest on one host: QEMU, in its sandbox, and the processes that serve it."""

import os
import subprocess
import time
from dataclasses import dataclass
from typing import List

from lab.guest.linux import COMMAND_LINE
from lab.outcome import Wrong
from lab.qemu import Guest

from .hosts import SHARED, Host

SANDBOX = ('on,obsolete=deny,elevateprivileges=deny,spawn=deny,'
           'resourcecontrol=deny')

# The one that can migrate; that of QEMU 7.2 lies elsewhere, and cannot
VIRTIOFSD = '/usr/libexec/virtiofsd'

DISK = f'{SHARED}/disk.img'
DIRECTORY = f'{SHARED}/directory'
KERNEL = f'{SHARED}/vmlinuz'
INITRAMFS = f'{SHARED}/initramfs'


@dataclass(frozen=True)
class Kind:
    """What a guest is made of."""
    size: int
    accelerator: str
    machine: str
    vhost_user: bool
    virtiofs: bool = False

    @property
    def targets(self) -> int:
        """Files that its io-load is at work with."""
        return 1 + self.virtiofs


def _wait_for(path: str, process: 'subprocess.Popen[bytes]') -> None:
    deadline = time.monotonic() + 20
    while not os.path.exists(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Wrong(f'{path} is not there: {process.args!r} has failed')
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


class Vm(Guest):
    """A QEMU and its backends, each a process of its own."""

    _count = 0

    def __init__(self, host: Host, binary: str, kind: Kind,
                 incoming: bool) -> None:
        Vm._count += 1
        self.host, self.binary, self._kind = host, binary, kind
        self._sockets = f'/run/stack/{Vm._count}'
        self._processes: List['subprocess.Popen[bytes]'] = []
        options = self._vhost_user() if kind.vhost_user else [
            '-blockdev', f'file,node-name=disk,filename={DISK},locking=off,'
            'cache.direct=on,aio=native', '-device',
            'virtio-blk-pci,drive=disk,share-rw=on']
        super().__init__(
            f'{host.name}-{Vm._count}', binary, kind.size, accel=kind.accelerator,
            incoming=incoming, wrapper=('chroot', host.root), extra_args=(
                '-machine', kind.machine, '-sandbox', SANDBOX, '-smp', '2',
                '-kernel', KERNEL, '-initrd', INITRAMFS, '-append', COMMAND_LINE,
                '-chardev', f'socket,id=serial,path={self._sockets}/serial,'
                'server=on,wait=off', '-serial', 'chardev:serial',
                '-device', 'virtio-balloon-pci,free-page-reporting=on',
                *options))

    def path(self, name: str) -> str:
        """A socket of this guest, as we see it."""
        return self.host.path(f'{self._sockets}/{name}')

    def allocated(self) -> int:
        """Bytes of guest RAM that are allocated."""
        return self.ram.allocated() or 0

    def _vhost_user(self) -> List[str]:
        """QEMU's options for what qemu-storage-daemon and virtiofsd serve."""
        return ['-chardev', f'socket,id=disk,path={self._sockets}/disk',
                '-device', 'vhost-user-blk-pci,chardev=disk,num-queues=1',
                *(('-chardev', f'socket,id=fs,path={self._sockets}/fs', '-device',
                   'vhost-user-fs-pci,chardev=fs,tag=share')
                  if self._kind.virtiofs else ())]

    def _start(self) -> None:
        os.makedirs(self.host.path(self._sockets))
        if self._kind.vhost_user:
            self._processes.append(
                serve_disk(self.host, f'{self._sockets}/disk'))
        if self._kind.virtiofs:
            virtiofsd = self.host.start('virtiofsd', [
                VIRTIOFSD,
                f'--socket-path={self._sockets}/fs',
                f'--shared-dir={DIRECTORY}'])
            self._processes.append(virtiofsd)
            _wait_for(self.path('fs'), virtiofsd)
        super()._start()

    def __exit__(self, *exc: object) -> None:
        """End all of it; what QEMU has said goes to a log."""
        if self._vm:
            with open(self.host.log('qemu'), 'a', encoding='utf-8') as log:
                log.write(self.end())
        super().__exit__(*exc)
        for process in self._processes:
            process.kill()
            process.wait()
