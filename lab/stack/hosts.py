# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts on this machine: copies of one Debian, in mount namespaces.

They share the network, which has nothing but loopback, and the directory SHARED.
"""

import os
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

    def __init__(self, name: str, debian: str, directory: str) -> None:
        """directory: for what is written, and for the root"""
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
        self._add_libraries()

    def path(self, path: str) -> str:
        """Where a file of this host is for us."""
        return self.root + path

    def _mount(self) -> None:
        root = self.root
        command('mount', '-t', 'proc', 'proc', f'{root}/proc')
        # Not what is mounted below it: cgroups are the machine's
        command('mount', '--bind', '/sys', f'{root}/sys')
        command('mount', '--rbind', '/dev', f'{root}/dev')
        command('mount', '-t', 'tmpfs', 'run', f'{root}/run')
        command('mount', '--bind', SHARED, f'{root}{SHARED}')
        os.makedirs(f'{root}{PREFIX}', exist_ok=True)
        command('mount', '--bind', f'{BUILD}/stack{PREFIX}', f'{root}{PREFIX}')
        os.makedirs(f'{root}/run/stack', mode=0o755)
        self._let_users_have_userfaultfd()

    def _let_users_have_userfaultfd(self) -> None:
        """As hosts do where libvirt's user shall use postcopy; the machine's own
        device stays as it is.
        """
        device = '/dev/userfaultfd'
        if os.path.exists(device):
            node = f'{os.path.dirname(self.root)}/userfaultfd'
            os.mknod(node, 0o020666, os.stat(device).st_rdev)
            os.chmod(node, 0o666)
            command('mount', '--bind', node, f'{self.root}{device}')

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
        version = command('chroot', self.root, PATCHED, '--version')
        if 'QEMU emulator version' not in version:
            raise Wrong(f'the patched QEMU does not run there: {version}')

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

    def run(self, *words: str) -> str:
        """Run a program to its end."""
        return command('chroot', self.root, *words)
