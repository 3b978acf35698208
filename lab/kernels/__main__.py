# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the unit tests on kernels that hosts have, each in a VM of our own QEMU.

Which answers a kernel gives to the questions that this project asks is printed
too.  scripts/check-kernels fetches the kernels and starts this.

Exit status: 0 if all tests passed on all kernels; 1 if not.
"""

import argparse
import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, Sequence, Set, Tuple

from lab.stack.common import (BUILD, ROOT, UserError, busybox, cpio_archive,
                              cpio_entry, kernel, pick_accelerator,
                              rst_table)

PATCHED = os.path.join(BUILD, 'patched')
QEMU = os.path.join(PATCHED, 'qemu-system-x86_64')
UNIT_TESTS = ('test-sparse-file', 'test-populated-memory', 'test-ram-holes')

# Seconds: a VM with TCG is slow
TIMEOUT = 900

_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /tmp
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
echo 64 >/proc/sys/vm/nr_hugepages
echo "kernel: $(uname -r)"
/answers
for test in {tests}; do
    /tests/$test
    echo "test: $test $?"
done
echo "the end"
poweroff -f
"""


def libraries(program: str) -> Set[str]:
    """The files that a program is linked with, the loader included."""
    text = subprocess.run(['ldd', program], check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    return set(re.findall(r'(/\S+) \(0x', text))


def _read(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def directories(paths: Sequence[str]) -> List[str]:
    """Those that have to be there for these files, the outer ones first."""
    found = set()
    for path in paths:
        while os.path.dirname(path):
            path = os.path.dirname(path)
            found.add(path)
    return sorted(found)


def make_initramfs(path: str) -> None:
    """busybox, the tests, and what they are linked with."""
    answers = f'{path}.answers'
    subprocess.run([os.environ.get('CC', 'gcc'), '-static', '-O2', '-o',
                    answers, os.path.join(ROOT, 'lab/kernels/answers.c')],
                   check=True)
    files = {'answers': answers}
    for name in UNIT_TESTS:
        program = f'{PATCHED}/tests/unit/{name}'
        files[f'tests/{name}'] = program
        for library in libraries(program):
            files[library.lstrip('/')] = os.path.realpath(library)
    init = _INIT.format(tests=' '.join(UNIT_TESTS))
    entries = [cpio_entry(name, 0o040755)
               for name in ('proc', 'sys', 'bin', 'dev',
                            *directories(list(files)))]
    entries += [cpio_entry('dev/console', 0o020600, device=(5, 1)),
                cpio_entry('init', 0o100755, init.encode('ascii'))]
    entries += [cpio_entry(f'bin/{name}', 0o120777, b'busybox')
                for name in ('sh', 'mount', 'mkdir', 'uname', 'poweroff')]
    entries += [cpio_entry(name, 0o100755, _read(program))
                for name, program in files.items()]
    with open(path, 'wb') as file:
        file.write(cpio_archive(entries))


def with_busybox(path: str, guest: str) -> bytes:
    """The whole initramfs of a guest: Linux takes several in a row."""
    return gzip.compress(_read(path) + cpio_archive(
        [cpio_entry('bin', 0o040755),
         cpio_entry('bin/busybox', 0o100755, busybox(guest))]),
        compresslevel=1)


def boot(guest: str, accelerator: str, initramfs: str, log: str) -> str:
    """Let it run to its end; returns what its console said."""
    words = [QEMU, '-nodefaults', '-display', 'none', '-no-reboot',
             '-accel', accelerator, '-cpu', 'max', '-smp', '2', '-m', '2G',
             '-kernel', kernel(guest), '-initrd', initramfs,
             '-append', 'console=ttyS0 quiet panic=-1',
             '-serial', f'file:{log}']
    try:
        subprocess.run(words, check=True, timeout=TIMEOUT,
                       stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        print(f'FAILED: {guest}: no end within {TIMEOUT} seconds')
    with open(log, encoding='utf-8', errors='replace') as file:
        return file.read()


def summary(text: str) -> Tuple[str, Dict[str, str], Dict[str, str]]:
    """The kernel's version, its answers, and what became of the tests."""
    version = re.search(r'kernel: (\S+)', text)
    answers = dict(re.findall(r'answer: (.*) (yes|no, .*?)\r?\n', text))
    tests = {name: 'ok' if status == '0' else f'status {status}'
             for name, status in re.findall(r'test: (\S+) (\d+)', text)}
    for name in UNIT_TESTS:
        if tests.setdefault(name, 'not run') == 'ok':
            own = text[:text.index(f'test: {name} ')].rpartition('test: ')[2]
            skipped = len(re.findall(r'^ok .*# SKIP', own, re.M))
            passed = len(re.findall(r'^ok ', own, re.M)) - skipped
            tests[name] = f'{passed} ok, {skipped} skipped'
    return version[1] if version else 'none', answers, tests


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
        base = os.path.join(directory, 'base')
        make_initramfs(base)
        for suite in args.suites:
            guest = os.path.join(ROOT, f'build/guest-{suite}')
            initramfs = os.path.join(directory, suite)
            with open(initramfs, 'wb') as file:
                file.write(with_busybox(base, guest))
            started = time.monotonic()
            version, answers, tests = summary(
                boot(guest, accelerator, initramfs, f'{logs}/{suite}.log'))
            bad = [name for name, result in tests.items() if ' ok,' not in result]
            failures += len(bad)
            for name in bad:
                print(f'FAILED: {version}: {name}: {tests[name]} '
                      f"(see {os.path.relpath(logs, ROOT)}/{suite}.log)")
            rows.append([version, *(answers.get(name, 'none') for name in (
                'cachestat', 'PAGEMAP_SCAN', 'SEEK_DATA')),
                         *(tests[name] for name in UNIT_TESTS),
                         f'{time.monotonic() - started:.0f} s'])
            print(f'  {rows[-1]}', flush=True)
    print(rst_table(('kernel', 'cachestat', 'PAGEMAP_SCAN', 'SEEK_DATA',
                     *UNIT_TESTS, 'time'), rows))
    print(f'{len(rows) * len(UNIT_TESTS) - failures} passed, {failures} failed')
    return min(failures, 1)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except UserError as err:
        sys.exit(f'check-kernels: {err}')
