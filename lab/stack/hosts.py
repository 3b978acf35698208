# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on this machine: copies of one Debian, in mount namespaces.

They share the network, which has nothing but loopback, and the directory SHARED.
"""

import os
import re
import shutil
import subprocess
from typing import List, Sequence

from lab.base import BUILD
from lab.outcome import Wrong

# The same directory for both hosts and for us: this exists everywhere
SHARED = '/mnt'

# Where the patched QEMU lies on each host
PREFIX = '/opt/sparse-ram'

PATCHED = f'{PREFIX}/bin/qemu-system-x86_64'
STOCK = '/usr/bin/qemu-system-x86_64'
# scripts/get-newest-qemu has unpacked it there
NEWEST = '/opt/newest/usr/bin/qemu-system-x86_64'

_DEVICES = ('null', 'zero', 'full', 'random', 'urandom', 'tty', 'userfaultfd')


def command(*words: str) -> str:
    """Run a command to its end; returns what it prints."""
    result = subprocess.run(words, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            timeout=120, check=False)
    if result.returncode:
        raise Wrong(f'{" ".join(words)}: {result.stdout.strip()}')
    return result.stdout


def share(directory: str) -> None:
    """Let SHARED be this directory, in our mount namespace."""
    command('mount', '--bind', directory, SHARED)


class Host:
    """A Debian that can be written to: an overlay over the one in build/."""

    def __init__(self, name: str, debian: str, directory: str, kvm: bool) -> None:
        """directory: for what is written, and for the root; kvm: whether it has it"""
        self.name = name
        self.root = os.path.join(directory, name, 'root')
        self._processes: List['subprocess.Popen[bytes]'] = []
        self._logs = os.path.join(BUILD, 'logs/stack')
        os.makedirs(self._logs, exist_ok=True)
        for part in ('root', 'upper', 'work'):
            os.makedirs(os.path.join(directory, name, part))
        base = os.path.dirname(self.root)
        command('mount', '-t', 'overlay', '-o', f'lowerdir={debian},'
                f'upperdir={base}/upper,workdir={base}/work', name, self.root)
        self._mount()
        self._make_devices(kvm)
        self._add_libraries()

    def path(self, path: str) -> str:
        """Where a file of this host is for us."""
        return self.root + path

    def _mount(self) -> None:
        root = self.root
        command('mount', '-t', 'proc', 'proc', f'{root}/proc')
        # Not what is mounted below it: cgroups are the machine's
        command('mount', '--bind', '/sys', f'{root}/sys')
        command('mount', '-t', 'tmpfs', 'run', f'{root}/run')
        command('mount', '--bind', SHARED, f'{root}{SHARED}')
        os.makedirs(f'{root}{PREFIX}', exist_ok=True)
        command('mount', '--bind', f'{BUILD}/stack{PREFIX}', f'{root}{PREFIX}')
        os.makedirs(f'{root}/run/stack', mode=0o755)
        # libvirtd waits for its name to be resolved, for 20 seconds a time
        with open(f'{root}/etc/hosts', 'w', encoding='ascii') as file:
            file.write(f'127.0.0.1 localhost\n127.0.1.1 {self.name}\n')

    def _make_devices(self, kvm: bool) -> None:
        """A /dev of its own; libvirt's user may have userfaultfd, as postcopy needs.

        A /dev/kvm that is there and is not to be used makes libvirtd ask each QEMU
        again and again what it can do, a minute each time.
        """
        dev = self.path('/dev')
        command('mount', '-t', 'tmpfs', '-o', 'mode=755', 'dev', dev)
        for name in (*_DEVICES, *(('kvm',) if kvm else ())):
            if os.path.exists(f'/dev/{name}'):
                os.mknod(f'{dev}/{name}', 0o020666, os.stat(f'/dev/{name}').st_rdev)
                os.chmod(f'{dev}/{name}', 0o666)
        for name in 'pts', 'shm':
            os.mkdir(f'{dev}/{name}')
        os.chmod(f'{dev}/shm', 0o1777)
        command('mount', '-t', 'devpts', '-o', 'newinstance,ptmxmode=0666', 'devpts',
                f'{dev}/pts')
        os.symlink('pts/ptmx', f'{dev}/ptmx')
        os.symlink('/proc/self/fd', f'{dev}/fd')

    def _add_libraries(self) -> None:
        """Libraries that the patched QEMU was linked with and Debian calls
        otherwise, as another release does.
        """
        there = command('chroot', self.root, 'ldconfig', '-p')
        for line in command('ldd', f'{BUILD}/stack{PATCHED}').splitlines():
            name, _, rest = line.strip().partition(' => ')
            if rest.startswith('/') and f'\t{name} ' not in there:
                shutil.copy(rest.split()[0], f'{self.root}/usr/local/lib/{name}')
        command('chroot', self.root, 'ldconfig')

    def log(self, name: str) -> str:
        """Where a program's output goes."""
        return os.path.join(self._logs, f'{self.name}-{name}.log')

    def start(self, name: str, words: Sequence[str]) -> 'subprocess.Popen[bytes]':
        """Start a program that runs until it is ended."""
        with open(self.log(name), 'ab') as log:
            process = subprocess.Popen(
                ['chroot', self.root, *words], stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT)
        self._processes.append(process)
        return process

    def has(self, program: str) -> bool:
        """Whether it is there."""
        return os.path.exists(self.path(program))

    def version(self, binary: str) -> str:
        """A QEMU's."""
        said = command('chroot', self.root, binary, '--version')
        match = re.search(r'QEMU emulator version (\S+)', said)
        if not match:
            raise Wrong(f'{binary} does not run there: {said}')
        return match[1]
