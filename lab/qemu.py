# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process with one memory backend, driven through QMP.

QEMU's own python/qemu does the work; import_qemu() has to be called first,
because it lies in a QEMU source tree and not on Python's path.  Qemu is any
process of QEMU's, Guest one with one memory backend, whose RAM is known.
"""

import importlib
import logging
import os
import re
import select
import shutil
import signal
import sys
import tempfile
from types import ModuleType
from typing import Any, Dict, Optional, Sequence, TypeVar

from lab import UserError
from lab.base import BUILD
from lab.cgroup import Cgroup
from lab.memory import format_size
from lab.outcome import ending
from lab.ram import KINDS, Ram, Sample, sample

# Where QEMU's own Python packages are
PYTHON = f'{BUILD}/patched-src/python'

_RAM_ID = 'mem1'

# Of RAM that is larger, the addresses do not fit into the 40 bits of the
# default processor
_LARGEST_WITH_DEFAULT_CPU = 1 << 39

_EXIT_TIMEOUT = 2       # seconds

_T = TypeVar('_T', bound='Qemu')

# Python packages of QEMU's
_machine: Optional[ModuleType] = None
_qmp: Optional[ModuleType] = None


def import_qemu(path: str = PYTHON) -> None:
    """Import qemu.machine from a QEMU source tree's python directory."""
    global _machine, _qmp
    if not os.path.isfile(os.path.join(path, 'qemu/machine/machine.py')):
        raise UserError(f"there is no qemu/machine in {path}: run 'make qemu' "
                        "first, or name the python directory of a QEMU "
                        "source tree with --qemu-python")
    sys.dont_write_bytecode = True      # leave the source tree as it is
    sys.path.insert(0, path)
    _machine = importlib.import_module('qemu.machine.machine')
    _qmp = importlib.import_module('qemu.qmp')
    # What it logs about a guest that had to be killed, we know
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)


def pick_accelerator() -> str:
    """'kvm' with hardware virtualization, else 'tcg'.

    /dev/kvm alone does not tell: without vmx or svm it can be there, and be
    slower than TCG.
    """
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        return 'tcg'
    with open('/proc/cpuinfo', encoding='ascii', errors='replace') as cpuinfo:
        has_vmx = re.search(r'^flags\b.*\b(vmx|svm)\b', cpuinfo.read(), re.M)
    return 'kvm' if has_vmx else 'tcg'


def _die_with_parent() -> Sequence[str]:
    """Command in front of QEMU that ends it even if Python is killed."""
    setpriv = shutil.which('setpriv')
    return (setpriv, '--pdeathsig', 'KILL', '--') if setpriv else ()


class GuestError(Exception):
    """QEMU refused a command; says which and why."""


class GuestGone(GuestError):
    """QEMU ended, or never started; says what it printed last."""


def _cpu(accel: str, size: int) -> Sequence[str]:
    """What kind of processor the guest needs, if not the default one."""
    features = []
    if accel == 'kvm':
        # The destination's KVM writes the time into the page that a guest
        # registered for its kvmclock (SeaBIOS does), and the two guests' RAM
        # would differ there
        features += ['kvmclock=off']
    if size > _LARGEST_WITH_DEFAULT_CPU:
        features += ['phys-bits=46']
    return ('-cpu', ','.join(['qemu64', *features])) if features else ()


class Qemu:
    """A QEMU process.  A context manager: starts on entry, is killed on exit."""

    def __init__(self, name: str, binary: str, args: Sequence[str], *,
                 cgroup: Optional[Cgroup] = None,
                 wrapper: Sequence[str] = ()):
        """
        name: what messages call it
        args: the command line, without what QMP needs
        cgroup: for the process to start in
        wrapper: a command in front of QEMU's, which becomes QEMU
        """
        self.name = name
        self._wrapper = (*(cgroup.command if cgroup else ()),
                         *_die_with_parent(), *wrapper)
        self._args = [*args]
        self._binary = binary
        self._vm: Any = None
        self._directory: Optional[tempfile.TemporaryDirectory[str]] = None
        self._pidfd = -1
        self.pid = -1

    def __enter__(self: _T) -> _T:
        assert _machine, 'import_qemu() was not called'
        self._directory = tempfile.TemporaryDirectory(prefix='sparse-ram-')
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        assert _machine and self._directory
        self._vm = _machine.QEMUMachine(
            self._binary, self._args, wrapper=self._wrapper,
            name=self.name, base_temp_dir=self._directory.name)
        # launch() waits half a minute for a QEMU that it could not connect to,
        # also when it is interrupted
        self._vm.wait = self._vm.kill
        try:
            self._vm.launch()
        except (_machine.VMLaunchFailure, OSError) as err:
            raise GuestGone(
                f'{self.describe()} did not start: '
                f'{_last_line(self._vm.get_log()) or "it said nothing"}'
            ) from err
        self.pid = self._vm.get_pid() or -1
        self._pidfd = os.pidfd_open(self.pid)
        # Should memory run out after all, then rather this than others
        with open(f'/proc/{self.pid}/oom_score_adj', 'w',
                  encoding='ascii') as oom_score_adj:
            oom_score_adj.write('1000')

    def describe(self) -> str:
        """For a message that it did not start."""
        return f'{self.name} QEMU ({self._binary})'

    def __exit__(self, *_: object) -> None:
        try:
            if self._vm:
                self._vm.kill()
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            if self._directory:
                self._directory.cleanup()

    def kill_now(self) -> None:
        """SIGKILL, from any thread; to be cleaned up after by __exit__."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except OSError:     # has ended, or was cleaned up after, already
            pass

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command, return what it returns."""
        assert _qmp and _machine
        try:
            return self._vm.cmd(command, **arguments)
        except _machine.QEMUMachineError as err:
            raise GuestGone(f'{self.name} QEMU has ended') from err
        except _qmp.ExecuteError as err:
            raise GuestError(f'{self.name} QEMU: {command}: {err}') from err
        except (_qmp.QMPError, OSError, EOFError) as err:
            raise GuestGone(f'{self.name} QEMU {self._bury()}') from err

    def _bury(self) -> str:
        """Clean up after a QEMU that does not talk any more; says why."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(_EXIT_TIMEOUT * 1000)     # it may not have ended yet
        self._vm.kill()
        how = f'has ended, {ending(self._vm.exitcode())}'
        line = _last_line(self._vm.get_log())
        return f'{how}: {line}' if line else how

    def hmp(self, line: str) -> str:
        """Type a line into the human monitor, return what it printed."""
        return self.qmp('human-monitor-command', command_line=line).strip()

    def query_migrate(self) -> Dict[str, Any]:
        """State of the migration, as query-migrate returns it."""
        return self.qmp('query-migrate')

    def migration_times(self) -> Dict[str, float]:
        """When the migration got into each of its states, by their names; in
        seconds since the Epoch.

        Of those since it was asked last; with the capability "events".
        """
        return {event['data']['status']:
                event['timestamp']['seconds'] +
                event['timestamp']['microseconds'] / 1e6
                for event in self._vm.get_qmp_events()
                if event['event'] == 'MIGRATION'}

    def status(self) -> str:
        """Run state: 'running', 'paused', 'postmigrate', ..."""
        return self.qmp('query-status')['status']

    def version(self) -> str:
        """Version of QEMU, with what its packager added."""
        version = self.qmp('query-version')
        qemu = version['qemu']
        return (f'{qemu["major"]}.{qemu["minor"]}.{qemu["micro"]}'
                f' {version["package"]}').strip()

    def send_fd(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a file descriptor; fd:NAME is its address."""
        self._vm.send_fd_scm(fd)
        self.qmp('getfd', fdname=name)

    def ended(self) -> Optional[int]:
        """Exit status, or minus the signal; None if it is alive."""
        return self._vm.exitcode()

    def end(self) -> str:
        """Kill it; returns all that it has printed."""
        self._vm.kill()
        return self._vm.get_log() or ''


class Guest(Qemu):
    """A QEMU with one memory backend."""

    def __init__(self, name: str, binary: str, size: int, *,
                 backend: str = 'memfd', accel: str = 'tcg',
                 paused: bool = False, incoming: bool = False,
                 ram_file: str = '', extra_args: Sequence[str] = (),
                 cgroup: Optional[Cgroup] = None,
                 wrapper: Sequence[str] = ()):
        """
        size: of guest RAM, in bytes
        backend: one of KINDS
        paused: do not start the virtual CPUs (-S)
        incoming: wait for a migration (-incoming defer)
        ram_file: the guest's own file, for a backend that has one
        extra_args: for QEMU's command line, after all others
        cgroup, wrapper: as of Qemu
        """
        options = KINDS[backend].object(_RAM_ID, size, ram_file, False)
        super().__init__(name, binary, [
            '-nodefaults', '-no-user-config',
            '-object', options,
            '-machine', f'q35,memory-backend={_RAM_ID},accel={accel}',
            '-smp', '4',
            *_cpu(accel, size),
            *(('-S',) if paused else ()),
            *(('-incoming', 'defer') if incoming else ()),
            *extra_args], cgroup=cgroup, wrapper=wrapper)
        self._size = size
        self._backend = backend
        self.ram: Ram

    def _start(self) -> None:
        super()._start()
        self.ram = Ram.of(self.pid, self._size, KINDS[self._backend].fs is not None)

    def describe(self) -> str:
        return f'{super().describe()} with {format_size(self._size)} of RAM'

    def sample(self) -> Sample:
        """What this process and its guest RAM have allocated."""
        return sample(self.pid, self.ram)


def _last_line(log: Optional[str]) -> str:
    lines = (log or '').strip().splitlines()
    return lines[-1] if lines else ''
