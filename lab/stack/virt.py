# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt: a daemon on each host, and all that it does with a guest's RAM."""

import os
import subprocess
import time
import uuid
from typing import Callable, Dict, List, Sequence, Tuple

from lab.guest.linux import COMMAND_LINE
from lab.measure.report import mib
from lab.outcome import Unavailable, Wrong
from lab.ram import Ram

from .direct import NAMES, Hop, complaints
from .guest import IoConsole, check, wait_for_boot
from .hosts import NEWEST, PATCHED, SHARED, STOCK, Host
from .vm import DIRECTORY, INITRAMFS, KERNEL, Kind, serve_disk

TIMEOUT = 600
NAME = 'guest'
QCOW2 = f'{SHARED}/disk.qcow2'
SAVED = f'{SHARED}/saved'

# Not in a cgroup, not in AppArmor's hands: neither is a part of the root
_QEMU_CONF = """
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
# There may be a limit already, which must not be raised
max_core = 0
"""

_LIBVIRTD_CONF = """
host_uuid = "{uuid}"
unix_sock_dir = "{sockets}"
auth_unix_rw = "none"
"""

_XML = """
<domain type='{type}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>6a2f7f2e-3f6e-4ac4-9d3f-3f4b5b1a7a11</uuid>
  <memory unit='b'>{size}</memory>
  <vcpu>2</vcpu>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    {devices}
    <serial type='unix'>
      <source mode='bind' path='/run/stack/serial'/>
    </serial>
    <memballoon model='virtio' freePageReporting='on'/>
  </devices>
  <qemu:commandline>{globals}</qemu:commandline>
</domain>
"""

_VHOST_USER = """
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw'/>
      <source type='unix' path='/run/stack/disk'/>
      <target dev='vda' bus='virtio'/>
    </disk>
"""

_VIRTIOFS = f"""
    <filesystem type='mount'>
      <driver type='virtiofs'/>
      <source dir='{DIRECTORY}'/>
      <target dir='share'/>
    </filesystem>
"""

_PLAIN = f"""
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='{QCOW2}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
"""


class Daemon:
    """libvirtd on a host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        sockets = f'{SHARED}/{host.name}'
        os.makedirs(sockets)
        os.chmod(host.path('/run/stack'), 0o777)
        self._write('qemu.conf', _QEMU_CONF)
        self._write('libvirtd.conf', _LIBVIRTD_CONF.format(
            uuid=uuid.uuid4(), sockets=sockets))
        self.uri = f'qemu+unix:///system?socket={sockets}/libvirt-sock'
        self._process = host.start('libvirtd', [
            'unshare', '--uts', 'sh', '-c',
            f'hostname {host.name} && exec /usr/sbin/libvirtd'])
        self._wait()

    def _write(self, name: str, text: str) -> None:
        with open(self.host.path(f'/etc/libvirt/{name}'), 'w',
                  encoding='utf-8') as file:
            file.write(text)

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self.virsh('version')
                return
            except Wrong:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def virsh(self, *words: str) -> str:
        """A command, to its end."""
        full = ['chroot', self.host.root, 'virsh', '-c', self.uri, *words]
        try:
            result = subprocess.run(
                full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
                check=False)
        except subprocess.TimeoutExpired as err:
            raise Wrong(f'virsh {words[0]} has not ended within {TIMEOUT} '
                        'seconds') from err
        if result.returncode:
            kind = Unavailable if 'support option' in result.stdout else Wrong
            raise kind(f'virsh {" ".join(words[:3])}: {result.stdout.strip()}')
        return result.stdout

    def pid(self) -> int:
        """The QEMU's of the guest."""
        with open(self.host.path(f'/run/libvirt/qemu/{NAME}.pid'),
                  encoding='ascii') as file:
            return int(file.read())


def _allocated(fd: int) -> int:
    """Bytes of a file."""
    return os.fstat(fd).st_blocks * 512


class Domain:
    """The guest, on whichever host it is."""

    def __init__(self, daemons: Sequence[Daemon], kind: Kind, log: str,
                 options: Sequence[str] = ()) -> None:
        """options: of QEMU, each with its value"""
        self._daemons, self._kind = list(daemons), kind
        self._console = IoConsole(log)
        self._file = f'{SHARED}/guest.xml'
        self.emulator = PATCHED
        self._options = options
        self._servers = [self._serve(daemon.host) for daemon in daemons
                         if kind.vhost_user]

    @staticmethod
    def _serve(host: Host) -> 'subprocess.Popen[bytes]':
        server = serve_disk(host, '/run/stack/disk')
        os.chmod(host.path('/run/stack/disk'), 0o777)
        return server

    @property
    def here(self) -> Daemon:
        """Where it is."""
        return self._daemons[0]

    def _write_xml(self) -> None:
        kind = self._kind
        text = _XML.format(
            type='kvm' if kind.accelerator == 'kvm' else 'qemu', name=NAME,
            size=kind.size, machine=kind.machine, kernel=KERNEL,
            initramfs=INITRAMFS, command_line=COMMAND_LINE,
            emulator=self.emulator,
            devices=(_VHOST_USER if kind.vhost_user else _PLAIN)
            + (_VIRTIOFS if kind.virtiofs else ''),
            globals=''.join(f"<qemu:arg value='{each}'/>"
                            for each in self._options))
        with open(self._file, 'w', encoding='utf-8') as file:
            file.write(text)

    def attach(self) -> None:
        """To the console, of a QEMU that has just started."""
        self._console.attach(self.here.host.path('/run/stack/serial'))

    def boot(self) -> None:
        """Start it, and wait until its loads are at work."""
        self._write_xml()
        self.here.virsh('define', self._file)
        self.here.virsh('start', NAME)
        self.attach()
        wait_for_boot(self._console, self._kind.targets)

    def move(self, emulator: str, *options: str) -> None:
        """To the other host, and another QEMU."""
        text = self.here.virsh('dumpxml', '--migratable', NAME).replace(
            f'<emulator>{self.emulator}<', f'<emulator>{emulator}<')
        with open(self._file, 'w', encoding='utf-8') as file:
            file.write(text)
        self.migrate('--xml', self._file, '--persistent-xml', self._file, *options)
        self.emulator = emulator

    def migrate(self, *options: str, by_daemon: bool = False) -> None:
        """To the other host; by_daemon: by libvirtd and not by virsh."""
        here, there = self._daemons
        here.virsh('migrate', '--live', '--persistent', '--undefinesource',
                   '--unsafe', *(('--p2p',) if by_daemon else ()), *options, NAME,
                   there.uri, *(() if by_daemon else ('tcp://127.0.0.1',)))
        self._daemons.reverse()
        self.attach()

    def save(self, *options: str) -> None:
        """To a file, and back."""
        self.here.virsh('save', NAME, SAVED, *options)
        # The number of channels is the last option
        self.here.virsh('restore', SAVED, *(
            options[-2:] if '--parallel-channels' in options else ()))
        os.unlink(SAVED)
        self.attach()

    def managed_save(self) -> None:
        """The same, by a start."""
        self.here.virsh('managedsave', NAME)
        self.here.virsh('start', NAME)
        self.attach()

    def dump(self) -> None:
        """Its memory, while it runs."""
        self.here.virsh('dump', '--memory-only', '--live', NAME, SAVED)
        os.unlink(SAVED)

    def snapshot(self) -> None:
        """In the disk, and back to it."""
        self.here.virsh('snapshot-create-as', NAME, 'one')
        self.here.virsh('snapshot-delete', NAME, 'one')

    def external_snapshot(self) -> None:
        """RAM and disk in files of their own."""
        self.here.virsh('snapshot-create-as', NAME, 'two', '--live',
                        '--memspec', f'file={SAVED},snapshot=external',
                        '--diskspec', f'vda,file={QCOW2}.two')
        self.here.virsh('snapshot-delete', NAME, 'two', '--metadata')
        # The disk goes on in the new file, which has to be there as long as
        # this guest; the next one gets a new one
        os.unlink(SAVED)

    def _ram(self) -> Ram:
        return Ram.of(self.here.pid(), self._kind.size, has_file=True)

    def act(self, name: str, action: Callable[[], None]) -> Hop:
        """Do something that keeps the guest alive; what came of it."""
        emulator = NAMES[self.emulator]
        # An open file can be asked after its QEMU has ended
        with self._ram().opened() as source:
            before = _allocated(source)
            started = time.monotonic()
            action()
            seconds = time.monotonic() - started
            after = _allocated(source)
        with self._ram().opened() as destination:
            there = _allocated(destination)
        said = check(self._console, self._kind.targets)
        hop = Hop(f'libvirt: {name}', emulator, NAMES[self.emulator], seconds,
                  before, after, there, said)
        return hop.judged(complaints(hop, self._kind.size))

    def end(self) -> None:
        """End it wherever it is."""
        for daemon in self._daemons:
            for words in (('destroy', NAME), ('undefine', NAME,
                                              '--managed-save',
                                              '--snapshots-metadata')):
                try:
                    daemon.virsh(*words)
                except Wrong:
                    pass
        if os.path.exists(f'{QCOW2}.two'):
            os.unlink(f'{QCOW2}.two')
        for server in self._servers:
            server.kill()
            server.wait()


# To other QEMUs, for what has no options that only the patched one knows; the
# second is for a guest that has booted with the newest one
STOCK_PEER: Dict[str, Callable[[Domain], None]] = {
    'to stock': lambda domain: domain.move(STOCK),
    'from stock': lambda domain: domain.move(PATCHED),
}
NEWEST_PEER: Dict[str, Callable[[Domain], None]] = {
    'from newest': lambda domain: domain.move(PATCHED),
    'to newest': lambda domain: domain.move(NEWEST),
}

# All that is done with a guest: one with vhost-user devices, or one without
ACTIONS: Dict[bool, Dict[str, Callable[[Domain], None]]] = {
    True: {
        'migrate': Domain.migrate,
        'migrate, parallel': lambda domain: domain.migrate(
            '--parallel', '--parallel-connections', '4'),
        'save': Domain.save,
        'save, sparse': lambda domain: domain.save('--image-format', 'sparse'),
        'save, sparse, parallel': lambda domain: domain.save(
            '--image-format', 'sparse', '--parallel-channels', '2'),
        'managedsave': Domain.managed_save,
        'dump': Domain.dump,
    },
    False: {
        'migrate, postcopy': lambda domain: domain.migrate(
            '--postcopy', '--postcopy-after-precopy'),
        'migrate, tunnelled': lambda domain: domain.migrate(
            '--tunnelled', by_daemon=True),
        'snapshot, internal': Domain.snapshot,
        'snapshot, external': Domain.external_snapshot,
    },
}


def run(daemons: Sequence[Daemon], kind: Kind, name: str, log: str,
        options: Sequence[str], wanted: Sequence[str], tell: Callable[[Hop], None],
        first: str = PATCHED) -> Tuple[List[Hop], List[str]]:
    """All of it, with one guest; returns what came of it, and what is wrong.

    first: the QEMU that it boots with.
    """
    done: List[Hop] = []
    problems: List[str] = []
    domain = Domain(daemons, kind, log, options)
    domain.emulator = first
    actions = {**ACTIONS[kind.vhost_user], **STOCK_PEER, **NEWEST_PEER}
    where = 'booting'
    try:
        domain.boot()
        for where in wanted:
            action = actions[where]
            try:
                hop = domain.act(f'{where}{name}', lambda: action(domain))
            except Unavailable as err:
                print(f'  skipped, {where}: {err}', flush=True)
                continue
            tell(hop)
            done.append(hop)
            problems += [f'{hop.mode}: {each} ({mib(hop.after)} and '
                         f'{mib(hop.there)} MiB)' for each in hop.problems]
    except (Wrong, RuntimeError) as err:
        problems.append(f'libvirt, {where}{name}: {err}')
    finally:
        domain.end()
    return done, problems
