# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrate a guest between two Debians, with all that such guests have.

A guest with a disk that qemu-storage-daemon serves and a directory that virtiofsd
serves, both at work all the time, moves to and fro in QEMU's sandbox, between the
patched QEMU and Debian's.  RAM of the patched side must not fill up, the guest must
find nothing wrong, and all has to end.  scripts/check-stack starts this, in
namespaces of its own.

Exit status: 0 if all is as it should be; 1 if not; 77 if something is missing.
"""

import argparse
import os
import shutil
import sys
from typing import Callable, List, Sequence, Tuple

from lab import UserError
from lab.base import BASE, BUILD
from lab.guest.linux import GUEST, kernel
from lab.measure.report import mib, rst_table
from lab.memory import GIB, MIB, format_size
from lab.migrate import MigrationFailed
from lab.outcome import Wrong
from lab.qemu import GuestError, import_qemu, pick_accelerator

from . import virt
from .direct import NAMES, Chain, Hop
from .guest import make_initramfs
from .hosts import NEWEST, PATCHED, STOCK, Host, command, share
from .vm import DIRECTORY, DISK, INITRAMFS, KERNEL, VIRTIOFSD, Kind

DISK_SIZE = 64 * MIB

# Modes for a guest with vhost-user devices, and where they lead; the last ones
# go through Debian's QEMUs, which fill up
VHOST_USER: Sequence[Tuple[str, str]] = (
    ('precopy', PATCHED), ('multifd', PATCHED), ('sparse-ram', PATCHED),
    ('sparse-ram-multifd', PATCHED),
    ('precopy', STOCK), ('precopy', PATCHED),
    ('multifd', STOCK), ('multifd', PATCHED))

# The same for one with a disk of QEMU's own: virtiofsd cannot do postcopy
PLAIN: Sequence[Tuple[str, str]] = (
    ('postcopy', PATCHED), ('preempt', PATCHED),
    ('sparse-ram-preempt', PATCHED),
    ('postcopy', STOCK), ('postcopy', PATCHED))

# From a guest that has booted with the newest QEMU
FROM_NEWEST: Sequence[Tuple[str, str]] = (
    ('precopy', PATCHED), ('postcopy', NEWEST), ('postcopy', PATCHED))

# What --quick leaves of it
QUICK_MODES = ('sparse-ram-multifd', 'precopy', 'sparse-ram-preempt')
QUICK_ACTIONS = ('migrate, parallel', 'save', 'to stock', 'from stock')


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog='check-stack',
                                     description=__doc__.split('\n\n', 1)[0])
    parser.add_argument('debian', help='where a Debian is')
    parser.add_argument('--size', type=int, metavar='GIB',
                        help='guest RAM (default: 2, or 1 if quick)')
    parser.add_argument('--accel', choices=('kvm', 'tcg'))
    parser.add_argument('--mode', action='append', dest='modes',
                        choices=sorted({name for name, _ in (*VHOST_USER, *PLAIN)}),
                        help='only this mode (can be repeated)')
    parser.add_argument('--part', choices=('vhost-user', 'plain', 'newest', 'libvirt'),
                        action='append', dest='parts',
                        help='only this part (can be repeated)')
    parser.add_argument('--action', action='append', dest='actions',
                        choices=[*virt.ACTIONS[True], *virt.ACTIONS[False],
                                 *virt.STOCK_PEER, *virt.NEWEST_PEER],
                        help="only this one of libvirt's (can be repeated)")
    parser.add_argument('--quick', action='store_true',
                        help='a few of each (minutes)')
    args = parser.parse_args()
    args.size = args.size or (1 if args.quick else 2)
    if args.quick:
        args.modes = args.modes or QUICK_MODES
        args.actions = args.actions or QUICK_ACTIONS
    return args


def prepare(directory: str) -> None:
    """What both hosts see: kernel, initramfs, disk, directory."""
    os.chmod(directory, 0o755)
    share(directory)
    shutil.copy(kernel(GUEST), KERNEL)
    make_initramfs(INITRAMFS)
    os.makedirs(DIRECTORY)
    os.chmod(DIRECTORY, 0o777)
    new_disk()


def new_disk() -> None:
    """An empty one, for the next guest."""
    with open(DISK, 'wb') as file:
        file.truncate(DISK_SIZE)
    os.chmod(DISK, 0o666)


def travel(name: str, hosts: Sequence[Host], kind: Kind,
           hops: Sequence[Tuple[str, str]], done: List[Hop],
           first: str = PATCHED) -> List[str]:
    """One guest, all its hops; returns what is wrong.

    first: the QEMU that it boots with.
    """
    if not hops or not hosts[0].has(first):
        return []
    new_disk()
    chain = Chain(hosts, kind, log_of(name))
    problems: List[str] = []
    where = 'booting'
    try:
        seconds = chain.boot(first)
        print(f'{name}: a guest of {format_size(kind.size)} '
              f'({kind.accelerator}) has booted in {seconds:.0f} seconds',
              flush=True)
        for mode, binary in hops:
            where = f'{mode} to {binary}'
            hop = chain.hop(mode, binary)
            print(f'  {row(hop)}', flush=True)
            done.append(hop)
            problems += [f'{name}, {where}: {each}' for each in hop.problems]
    except (Wrong, MigrationFailed, GuestError) as err:
        problems.append(f'{name}, {where}: {err}')
    finally:
        chain.end()
    return problems


def way_back(host: Host) -> bool:
    """Whether the newest QEMU takes guests of the patched one: 11.1 refuses the
    virtio devices of 10.0, the stock one's, too; see docs/known-qemu-bugs.rst.
    """
    return host.has(NEWEST) and (
        BASE != '10.0' or int(host.version(NEWEST).split('.')[0]) < 11)


def with_libvirt(args: argparse.Namespace, hosts: Sequence[Host],
                 kinds: Sequence[Kind], done: List[Hop]) -> List[str]:
    """All that libvirt does; returns what is wrong."""
    daemons = [virt.Daemon(host) for host in hosts]
    problems: List[str] = []
    for kind in kinds:
        every = virt.ACTIONS[kind.vhost_user]
        for name, options, first, actions in (
                ('', (), PATCHED, [*every, *virt.STOCK_PEER]),
                (', sparse-ram', ('-global', 'migration.sparse-ram=on'), PATCHED,
                 [] if args.quick else every),
                ('', (), NEWEST, virt.NEWEST_PEER)):
            wanted = [action for action in actions
                      if (not args.actions or action in args.actions)
                      and (action != 'to newest' or way_back(hosts[0]))]
            if not wanted or not hosts[0].has(first):
                continue
            new_disk()
            command('chroot', hosts[0].root, 'qemu-img', 'create', '-q', '-f',
                    'qcow2', virt.QCOW2, str(DISK_SIZE))
            os.chmod(virt.QCOW2, 0o666)
            hops, wrong = virt.run(
                daemons, kind, name, log_of(f'libvirt{name}-{kind.vhost_user}'),
                options, wanted, lambda hop: print(f'  {row(hop)}', flush=True),
                first)
            done += hops
            problems += wrong
    return problems


def log_of(name: str) -> str:
    """A file for the guest's console."""
    return os.path.join(BUILD, f'logs/stack/{name}.log')


def row(hop: Hop) -> List[str]:
    """A row of the table."""
    return [hop.mode, hop.source, hop.destination, f'{hop.seconds:.1f}',
            f'{mib(hop.before)} -> {mib(hop.after)}', mib(hop.there),
            '; '.join(hop.problems) or hop.guest]


def table(hops: Sequence[Hop]) -> str:
    """One row for each."""
    return rst_table(('mode', 'source', 'destination', 'seconds',
                      'source, MiB', 'destination, MiB', 'guest'),
                     [row(hop) for hop in hops])


def chosen(args: argparse.Namespace, host: Host,
           hops: Sequence[Tuple[str, str]]) -> Sequence[Tuple[str, str]]:
    """Those of the hops that are wanted and can be had."""
    return [hop for hop in hops if (not args.modes or hop[0] in args.modes)
            and host.has(hop[1])]


def introduce(host: Host) -> None:
    """Say which QEMUs there are, and what is missing."""
    for binary, name in NAMES.items():
        print(f'{name}: QEMU {host.version(binary)}' if host.has(binary) else
              f'skipped: there is no {name} QEMU', flush=True)
    if host.has(NEWEST) and not way_back(host):
        print('skipped: migrations to the newest QEMU, which refuses the virtio '
              f'devices of QEMU {BASE}', flush=True)
    if not host.has(VIRTIOFSD):
        print('skipped: virtiofs, because this Debian has no virtiofsd that can '
              'migrate', flush=True)


def run(args: argparse.Namespace, directory: str) -> int:
    """All of it; returns the exit status."""
    os.makedirs(f'{directory}/shared')
    prepare(f'{directory}/shared')
    accelerator = args.accel or pick_accelerator()
    hosts = [Host(name, args.debian, directory, accelerator == 'kvm')
             for name in ('one', 'two')]
    introduce(hosts[0])
    machine = 'pc-q35-' + '.'.join(hosts[0].version(STOCK).split('.')[:2])
    done: List[Hop] = []
    problems: List[str] = []

    def part(name: str, action: Callable[[], List[str]]) -> None:
        if not args.parts or name in args.parts:
            problems.extend(action())

    def kind(vhost_user: bool) -> Kind:
        return Kind(args.size * GIB, accelerator, machine, vhost_user,
                    vhost_user and hosts[0].has(VIRTIOFSD))

    part('vhost-user', lambda: travel('vhost-user', hosts, kind(True),
                                      chosen(args, hosts[0], VHOST_USER),
                                      done))
    part('plain', lambda: travel('plain', hosts, kind(False),
                                 chosen(args, hosts[0], PLAIN), done))
    part('newest', lambda: travel(
        'newest', hosts, kind(False),
        FROM_NEWEST if way_back(hosts[0]) else FROM_NEWEST[:1], done, NEWEST))
    part('libvirt', lambda: with_libvirt(
        args, hosts, [kind(True), *(() if args.quick else (kind(False),))], done))
    if done:
        print(table(done))
    for problem in problems:
        print(f'FAILED: {problem}')
    print(f'{sum(not hop.problems for hop in done)} passed, {len(problems)} failed')
    return 1 if problems or not done else 0


def reap(child: int) -> int:
    """Be the first process of the namespace: wait for orphans, as libvirt's
    QEMUs are, until our child ends; returns its exit status.
    """
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 255


def main() -> int:
    """In namespaces of our own already."""
    args = parse_args()
    import_qemu()
    child = os.fork()
    if child:
        return reap(child)
    command('ip', 'link', 'set', 'lo', 'up')
    # On tmpfs: what is written goes when this ends
    directory = os.path.join(BUILD, 'stack/run')
    os.makedirs(directory, exist_ok=True)
    command('mount', '-t', 'tmpfs', '-o', 'mode=755', 'stack', directory)
    try:
        return run(args, directory)
    except (Wrong, UserError) as err:
        print(f'FAILED: {err}')
        return 1


if __name__ == '__main__':
    sys.exit(main())
