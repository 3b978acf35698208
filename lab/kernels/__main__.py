# SPDX-License-Identifier: GPL-2.0-or-later
"""Test on kernels that hosts have, each in a VM of our own QEMU.

The unit tests run there, and the mailed qtests whose guests do not run; some of
these once more in a cgroup of version 2 that is smaller than their guests, with
swap.
Which answers a kernel gives to the questions that this project asks is printed
too.  scripts/check-kernels fetches the kernels and starts this.

Exit status: 0 if all tests passed on all kernels; 1 if not.
"""

import argparse
import glob
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Dict, Iterator, List, Sequence, Set, Tuple

from lab import UserError
from lab.base import BUILD, ROOT
from lab.ci.migration_tests import OWN_TESTS, PATCHED
from lab.guest.linux import (DISK_MODULES, compiled, initramfs, kernel, modules,
                             read_file)
from lab.measure.report import rst_table
from lab.memory import GIB
from lab.qemu import pick_accelerator

QEMU = os.path.join(PATCHED, 'qemu-system-x86_64')
UNIT_TESTS = ('test-sparse-file', 'test-populated-memory', 'test-ram-holes')

# The same program, twice
QTESTS = ('qtests', 'qtests, swapping')
TESTS = (*UNIT_TESTS, *QTESTS)

# Without what needs a guest that runs
QTEST_PROGRAM = f'{PATCHED}/tests/qtest/migration-test'
NOT_HERE = f'{OWN_TESTS}memfd/live'

# For swapping, which is slow: one of each way
SWAPPING = tuple(f'{OWN_TESTS}{name}' for name in (
    'memfd/plain', 'memfd/stale', 'modes/file/mapped-ram', 'modes/postcopy/p'))

# What a q35 loads without being asked
FIRMWARE = ('bios-256k.bin', 'kvmvapic.bin', 'vgabios-stdvga.bin', 'efi-e1000e.rom')

# Seconds: a VM with TCG is slow, more so on a busy machine
TIMEOUT = 5400
SWAP_SIZE = 1 * GIB

_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /tmp
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
swapped() {{ sed -n 's/^pswpout //p' /proc/vmstat; }}
for module in {modules}; do
    insmod "/$module"
done
ip link set lo up
mkswap /dev/vda >/dev/null && swapon /dev/vda
echo 512 >/proc/sys/vm/nr_hugepages
echo "kernel: $(uname -r)"
/answers
export QTEST_QEMU_BINARY=/usr/local/bin/qemu-system-x86_64
for test in {unit_tests}; do
    /tests/$test
    echo "test: $test $?"
done
{qtests}
echo "test: qtests $?"
before=$(swapped)
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/small
echo {limit} >/sys/fs/cgroup/small/memory.max
(echo 0 >/sys/fs/cgroup/small/cgroup.procs && {swapping})
echo "test: qtests, swapping $?"
echo "swapped: $(($(swapped) - before))"
echo "the end"
poweroff -f
"""

# Bytes: two guests of 128 MiB do not fit, even if half of them is holes
LIMIT = 100 << 20


def libraries(program: str) -> Set[str]:
    """The files that a program is linked with, the loader included."""
    text = subprocess.run(['ldd', program], check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    return set(re.findall(r'(/\S+) \(0x', text))


def directories(paths: Sequence[str]) -> List[str]:
    """Those that have to be there for these files, the outer ones first."""
    found = set()
    for path in paths:
        while os.path.dirname(path):
            path = os.path.dirname(path)
            found.add(path)
    return sorted(found)


def programs_and_libraries(directory: str) -> Dict[str, bytes]:
    """The tests, QEMU, and what they are linked with, by their paths in the guest.

    directory: for what is compiled or stripped
    """
    files = {'answers': compiled(os.path.join(ROOT, 'lab/kernels/answers.c'),
                                 os.path.join(directory, 'answers'))}
    stripped = os.path.join(directory, 'stripped')
    for program, path in (
            *((f'{PATCHED}/tests/unit/{name}', f'tests/{name}')
              for name in UNIT_TESTS),
            (QTEST_PROGRAM, 'tests/migration-test'),
            (QEMU, 'usr/local/bin/qemu-system-x86_64')):
        subprocess.run(['strip', '-o', stripped, program], check=True)
        files[path] = read_file(stripped)
        for library in libraries(program):
            files[library.lstrip('/')] = read_file(library)
    for name in FIRMWARE:
        found = glob.glob(f'{PATCHED}/qemu-bundle/usr/*/**/{name}', recursive=True)
        files[f'usr/local/share/qemu/{name}'] = read_file(found[0])
    return files


def qtests(*chosen: str) -> str:
    """The command that runs those that can be run there; chosen: beginnings of
    their paths.
    """
    listed = subprocess.run([QTEST_PROGRAM, '-l'], check=True, text=True,
                            env=dict(os.environ, QTEST_QEMU_BINARY=QEMU),
                            stdout=subprocess.PIPE).stdout.split()
    return ' '.join(['/tests/migration-test --tap -k', *(
        f'-p {path}' for path in listed
        if path.startswith(chosen) and not path.startswith(NOT_HERE))])


def boot(guest: str, accelerator: str, archive: str, log: str) -> str:
    """Let it run to its end; returns what its console said."""
    swap = os.path.join(os.path.dirname(archive), 'swap')
    with open(swap, 'wb') as file:
        file.truncate(SWAP_SIZE)
    words = [QEMU, '-nodefaults', '-display', 'none', '-no-reboot',
             '-accel', accelerator, '-cpu', 'max', '-smp', '2', '-m', '4G',
             '-kernel', kernel(guest), '-initrd', archive,
             '-append', 'console=ttyS0 quiet panic=-1',
             '-drive', f'file={swap},format=raw,if=virtio,cache=unsafe',
             '-serial', f'file:{log}']
    try:
        subprocess.run(words, check=True, timeout=TIMEOUT,
                       stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        print(f'FAILED: {guest}: no end within {TIMEOUT} seconds')
    with open(log, encoding='utf-8', errors='replace') as file:
        return file.read()


@dataclass(frozen=True)
class Summary:
    """What a kernel's console said.

    tests: what became of each; skipped: test and reason.
    """
    version: str
    answers: Dict[str, str]
    tests: Dict[str, str]
    skipped: List[Tuple[str, str]]
    swapped: int

    @classmethod
    def of(cls, text: str) -> 'Summary':
        """From the console's output."""
        version = re.search(r'^kernel: (\S+)', text, re.M)
        swapped = re.search(r'^swapped: (\d+)', text, re.M)
        tests = dict.fromkeys(TESTS, 'not run')
        start = 0
        for end in re.finditer(r'^test: (.*) (\d+)\r?$', text, re.M):
            own = text[start:end.start()]
            skipped = len(re.findall(r'^ok .*# SKIP', own, re.M))
            passed = len(re.findall(r'^ok ', own, re.M)) - skipped
            tests[end[1]] = (f'status {end[2]}' if end[2] != '0' or not passed
                             else f'{passed} ok, {skipped} skipped')
            start = end.end()
        return cls(version[1] if version else 'none',
                   dict(re.findall(r'^answer: (.*) (yes|no, .*?)\r?$', text, re.M)),
                   tests,
                   re.findall(r'^ok \d+ (?:- )?(\S+) # SKIP ?(.*?)\r?$', text, re.M),
                   int(swapped[1]) if swapped else 0)

    def problems(self) -> Iterator[str]:
        """What is wrong."""
        for name, result in self.tests.items():
            if ' ok,' not in result:
                yield f'{name}: {result}'
        if not self.swapped:
            yield 'nothing was swapped out'


def main() -> int:
    """All kernels."""
    parser = argparse.ArgumentParser(prog='check-kernels',
                                     description=__doc__.split('\n\n', 1)[0])
    parser.add_argument('suites', nargs='+', metavar='SUITE')
    parser.add_argument('--accel', choices=('kvm', 'tcg'))
    args = parser.parse_args()
    accelerator = args.accel or pick_accelerator()
    rows, failures = [], 0
    logs = os.path.join(BUILD, 'logs/kernels')
    os.makedirs(logs, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='kernels-') as directory:
        files = programs_and_libraries(directory)
        tests = {'unit_tests': ' '.join(UNIT_TESTS), 'qtests': qtests(OWN_TESTS),
                 'swapping': qtests(*SWAPPING)}
        for suite in args.suites:
            guest = os.path.join(ROOT, f'build/guest-{suite}')
            drivers = modules(f'{guest}/kernel', DISK_MODULES)
            init = _INIT.format(modules=' '.join(drivers), limit=LIMIT, **tests)
            archive = os.path.join(directory, suite)
            with open(archive, 'wb') as file:
                file.write(initramfs(
                    guest, init, {**files, **drivers}, directories(list(files)),
                    ('mkdir', 'uname', 'poweroff', 'insmod', 'mkswap', 'swapon',
                     'sed', 'ip')))
            started = time.monotonic()
            said = Summary.of(boot(guest, accelerator, archive,
                                   f'{logs}/{suite}.log'))
            for problem in said.problems():
                failures += 1
                print(f'FAILED: {said.version}: {problem} '
                      f'(see {os.path.relpath(logs, ROOT)}/{suite}.log)')
            for name, reason in said.skipped:
                print(f'  {said.version}: skipped {name}: {reason}')
            rows.append([said.version, *(said.answers.get(name, 'none') for name in (
                'cachestat', 'PAGEMAP_SCAN', 'SEEK_DATA')),
                         *said.tests.values(), f'{said.swapped} pages',
                         f'{time.monotonic() - started:.0f} s'])
            print(f'  {rows[-1]}', flush=True)
    print(rst_table(('kernel', 'cachestat', 'PAGEMAP_SCAN', 'SEEK_DATA',
                     *TESTS, 'swapped out', 'time'), rows))
    print(f'{len(rows)} kernels, {failures} failures')
    return min(failures, 1)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except UserError as err:
        sys.exit(f'check-kernels: {err}')
