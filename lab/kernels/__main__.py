# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the unit tests on kernels that hosts have, each in a VM of our own QEMU.

Which answers a kernel gives to the questions that this project asks is printed
too.  scripts/check-kernels fetches the kernels and starts this.

Exit status: 0 if all tests passed on all kernels; 1 if not.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, Sequence, Set, Tuple

from lab import UserError
from lab.base import BUILD, ROOT
from lab.guest.linux import compiled, initramfs, kernel, read_file
from lab.measure.report import rst_table
from lab.qemu import pick_accelerator

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


def directories(paths: Sequence[str]) -> List[str]:
    """Those that have to be there for these files, the outer ones first."""
    found = set()
    for path in paths:
        while os.path.dirname(path):
            path = os.path.dirname(path)
            found.add(path)
    return sorted(found)


def tests_and_libraries(directory: str) -> Dict[str, bytes]:
    """The tests, and what they are linked with, by their paths in the guest.

    directory: for what is compiled
    """
    files = {'answers': compiled(os.path.join(ROOT, 'lab/kernels/answers.c'),
                                 os.path.join(directory, 'answers'))}
    for name in UNIT_TESTS:
        program = f'{PATCHED}/tests/unit/{name}'
        files[f'tests/{name}'] = read_file(program)
        for library in libraries(program):
            files[library.lstrip('/')] = read_file(library)
    return files


def boot(guest: str, accelerator: str, archive: str, log: str) -> str:
    """Let it run to its end; returns what its console said."""
    words = [QEMU, '-nodefaults', '-display', 'none', '-no-reboot',
             '-accel', accelerator, '-cpu', 'max', '-smp', '2', '-m', '2G',
             '-kernel', kernel(guest), '-initrd', archive,
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
        files = tests_and_libraries(directory)
        init = _INIT.format(tests=' '.join(UNIT_TESTS))
        for suite in args.suites:
            guest = os.path.join(ROOT, f'build/guest-{suite}')
            archive = os.path.join(directory, suite)
            with open(archive, 'wb') as file:
                file.write(initramfs(guest, init, files, directories(list(files)),
                                     ('mkdir', 'uname', 'poweroff')))
            started = time.monotonic()
            version, answers, tests = summary(
                boot(guest, accelerator, archive, f'{logs}/{suite}.log'))
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
