# SPDX-License-Identifier: GPL-2.0-or-later
"""Feed damaged migration streams to a real QEMU.

Streams are captured from migrations with the capability sparse-ram.  Their RAM
records are changed, dropped, repeated and cut at random, and each result is
given to a QEMU of its own with -incoming.  It has to refuse it, with a message
and status 1, or to accept it; a signal, another status, silence or an
allocation out of proportion is a finding, and the stream is saved.

Damaged streams are made from --seed alone: the same seed and --jobs 1 gives
the same streams in the same order.

With --corpus, the RAM records of the streams are written as seeds for the
libFuzzer target ram-load-fuzz (tests/qtest/fuzz/ram_load_fuzz.c), and that is
all.  A QEMU that is built with sanitizers finds more than one without.
"""

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, Optional, Tuple

from lab import UserError, host
from lab.base import BUILD
from lab.cli import check_binaries, run_main
from lab.memory import MIB
from lab.outcome import ending
from lab.ram import Ram
from lab.stream import CONTINUE, DATA, EOS, PAGE, XBZRLE, ZERO, Stream


BLOCK = b'mem0'
RAM_SIZE = 16 * MIB

TIMEOUT = 60            # seconds, for what takes well below one
SANITIZER_STATUS = 99   # so that it is not taken for QEMU's own status 1

# The memory of a QEMU may grow by this, and by what the stream brings
MAX_GROWTH = 8 * MIB

# Numbers that are at the limit of something
NUMBERS = (0, 1, 2, RAM_SIZE // PAGE - 1, RAM_SIZE // PAGE,
           RAM_SIZE // PAGE + 1, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32,
           (1 << 51), (1 << 52) - 1, 1 << 52, (1 << 52) + 1, (1 << 63) - 1,
           1 << 63, (1 << 64) - PAGE, (1 << 64) - 1)


class Qemu:
    """A QEMU with nothing but RAM; talks QMP on stdin and stdout.

    Not lab.qemu.Qemu: that takes half as long again to start, and QEMU's package
    cannot read a log that is not UTF-8, as names of blocks need not be.
    """

    def __init__(self, binary: str, *args: str):
        self._stderr = tempfile.TemporaryFile()
        environment = dict(os.environ)
        for name in ('ASAN_OPTIONS', 'UBSAN_OPTIONS'):
            environment[name] = ':'.join(filter(None, (
                environment.get(name), f'exitcode={SANITIZER_STATUS}',
                'halt_on_error=1:detect_leaks=0')))
        self._process = subprocess.Popen(
            [binary, '-nodefaults', '-no-user-config', '-display', 'none',
             '-S', '-accel', 'qtest', '-qmp', 'stdio',
             '-machine', f'none,memory-backend={BLOCK.decode()}',
             '-m', f'{RAM_SIZE // MIB}M',
             '-object', f'memory-backend-memfd,id={BLOCK.decode()},share=on,'
             f'size={RAM_SIZE}',
             '-global', 'migration.x-events=on', *args],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stderr, env=environment)
        self.pid = self._process.pid
        self.hung = False
        self._timer = threading.Timer(TIMEOUT, self._hang)
        self._timer.start()
        self.send('qmp_capabilities')

    def __enter__(self) -> 'Qemu':
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _hang(self) -> None:
        self.hung = True
        self._process.kill()

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command, do not wait for what comes back."""
        assert self._process.stdin
        line = json.dumps({'execute': command, 'arguments': arguments})
        try:
            self._process.stdin.write(line.encode() + b'\n')
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def messages(self) -> Iterator[Dict[str, Any]]:
        """What QEMU says until it ends."""
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                yield json.loads(line)
            except ValueError:
                return

    def migrated(self) -> Optional[bool]:
        """Wait for the end of a migration; None if QEMU ended."""
        for message in self.messages():
            if 'error' in message:
                raise UserError(f"QEMU: {message['error']['desc']}")
            status = (message.get('data') or message.get('return') or {}).get('status')
            if status in ('completed', 'failed'):
                return status == 'completed'
        return None

    def status(self) -> int:
        """Wait for the process; its exit status, negative for a signal."""
        return self._process.wait()

    def errors(self) -> str:
        """What it has printed."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors='replace')

    def ram(self) -> Ram:
        """Guest RAM."""
        return Ram.of(self.pid, RAM_SIZE, has_file=True)


def capture(binary: str, directory: str, sparse: bool) -> Stream:
    """Migrate a guest with data, zero pages and holes to a file."""
    path = os.path.join(directory, 'captured')
    with Qemu(binary, '-global',
              f'migration.sparse-ram={"on" if sparse else "off"}') as source:
        for message in source.messages():
            if 'return' in message:     # has started
                break
        else:
            raise UserError(f'{binary} did not start: '
                            f'{source.errors().strip() or "it said nothing"}')
        ram = source.ram()
        for page in (0, 1, 5, 100, 101, 102, 2000, RAM_SIZE // PAGE - 1):
            ram.write(page * PAGE, bytes([page & 0xff or 1]) * PAGE)
        for page in (2, 3, 50, 2001):
            ram.write(page * PAGE, bytes(PAGE))
        source.send('migrate', uri=f'file:{path}')
        if not source.migrated():
            raise UserError(f'{binary} could not migrate to a file: '
                            f'{source.errors().strip()}')
    with open(path, 'rb') as file:
        return Stream(file.read())


def header(rng: random.Random, flags: int) -> bytes:
    """A page header that is right, or nearly."""
    page = rng.choice((0, 1, rng.randrange(RAM_SIZE // PAGE),
                       RAM_SIZE // PAGE - 1, *NUMBERS))
    name = b''
    if rng.random() < 0.3:
        flags |= CONTINUE
    else:
        text = rng.choice((BLOCK, BLOCK, BLOCK, b'', b'mem1', b'\xff' * 255))
        name = bytes([len(text)]) + text
    return struct.pack('>Q', page * PAGE % (1 << 64) | flags) + name


def new_record(rng: random.Random) -> bytes:
    """A record that was not in the stream."""
    kind = rng.choice(('run', 'run', 'run', 'zero', 'data', 'xbzrle', 'flags'))
    if kind == 'run':
        return header(rng, ZERO) + b'\1' + struct.pack(
            '>Q', rng.choice((rng.choice(NUMBERS), rng.randrange(1, 100))))
    if kind == 'zero':
        return header(rng, ZERO) + bytes([rng.choice((0, 0, 2, 255))])
    if kind == 'data':
        return header(rng, DATA) + rng.randbytes(1) * PAGE
    if kind == 'xbzrle':
        data = rng.randbytes(rng.randrange(64))
        length = struct.pack('>H', len(data))
        return header(rng, XBZRLE) + b'\1' + length + data
    return header(rng, rng.randrange(PAGE))


def damage_bytes(rng: random.Random, record: bytes) -> bytes:
    """Change some bytes, most of them near the start."""
    data = bytearray(record)
    for _ in range(rng.randrange(1, 4)):
        pos = rng.randrange(min(len(data), rng.choice((8, 24, PAGE))))
        data[pos] = rng.choice((0, 1, 0xff, data[pos] ^ 1 << rng.randrange(8)))
    return bytes(data)


def damage(rng: random.Random, stream: Stream) -> bytes:
    """A whole stream, damaged."""
    records = list(stream.records)
    for _ in range(rng.randrange(1, 6)):
        where = rng.randrange(len(records))
        what = rng.randrange(5)
        if what == 0 and len(records) > 1:
            del records[where]
        elif what == 1:
            records.insert(where, rng.choice(records))
        elif what == 2:
            records[where] = damage_bytes(rng, records[where])
        else:
            records.insert(where, new_record(rng))
    data = b''.join(records)
    if rng.random() < 0.3:
        data = data[:rng.randrange(len(data))]
    return stream.head + data


def check(binary: str, path: str, sparse: bool) -> str:
    """Give a stream to a QEMU.  Returns what is wrong, or nothing."""
    with Qemu(binary, '-global',
              f'migration.sparse-ram={"on" if sparse else "off"}',
              '-incoming', f'file:{path}') as target:
        # It may have ended before there were events
        target.send('query-migrate')
        accepted = target.migrated()
        if accepted:
            allocated = target.ram().allocated() or 0
            # With huge pages, a few pages of data are all of RAM
            if host.shmem_unit() < 2 * MIB and \
                    allocated > os.path.getsize(path) + MAX_GROWTH:
                return f'{allocated} bytes of guest RAM are allocated'
            return ''
        status = target.status()
        if target.hung:
            return f'no answer within {TIMEOUT} seconds'
        errors = target.errors()
        if status != 1:
            return f'QEMU has ended, {ending(status)}: {errors.strip()[-2000:]}'
        if 'runtime error' in errors or 'Sanitizer' in errors:
            return f'a sanitizer said: {errors.strip()[-2000:]}'
        return '' if errors.strip() else 'QEMU ended without a message'


class Fuzzer:
    """Runs until the time is over, or something is found."""

    def __init__(self, args: argparse.Namespace, directory: str):
        self._args = args
        self._directory = directory
        self._end = time.monotonic() + args.seconds
        self._lock = threading.Lock()
        self._rng = random.Random(args.seed)
        self._streams = [(capture(args.qemu, directory, sparse), sparse)
                         for sparse in (True, False)]
        self.count = 0
        self.finding = ''

    def _next(self) -> Tuple[int, bytes, bool]:
        with self._lock:
            self.count += 1
            # A run for a QEMU that must not know it: one in eight
            stream, sparse = self._streams[self._rng.random() < 0.125]
            return self.count, damage(self._rng, stream), sparse

    def _save(self, number: int, path: str, sparse: bool, what: str) -> None:
        with self._lock:
            os.makedirs(self._args.save, exist_ok=True)
            saved = os.path.join(
                self._args.save, f'stream-{self._args.seed}-{number}'
                f'{"" if sparse else "-off"}')
            shutil.copyfile(path, saved)
            self.finding = f'stream {number}, saved as {saved}: {what}'

    def work(self, worker: int) -> None:
        """One of the threads."""
        path = os.path.join(self._directory, f'damaged-{worker}')
        while time.monotonic() < self._end and not self.finding:
            number, data, sparse = self._next()
            with open(path, 'wb') as file:
                file.write(data)
            what = check(self._args.qemu, path, sparse)
            if what:
                self._save(number, path, sparse, what)


def seeds(stream: Stream, sparse: bool) -> Iterator[bytes]:
    """What ram_load_fuzz.c takes: a byte of flags, then the records."""
    flags = 1 if sparse else 0
    setup = b''.join(stream.setup)
    end = struct.pack('>Q', EOS)
    for block in (BLOCK, b'fuzz.anon', b'fuzz.resizeable'):
        old, new = (bytes([len(name)]) + name for name in (BLOCK, block))
        # All of it, and each kind of record on its own
        for records in [stream.records] + [[each] for each in stream.records[:8]]:
            data = b''.join(records)
            if block == BLOCK:
                data = setup + data
            yield bytes([flags]) + data.replace(old, new)
            # The same after the switch to postcopy, with nothing before it
            yield bytes([flags | 2]) + end + b''.join(records).replace(old, new)


def write_corpus(binary: str, directory: str, corpus: str) -> int:
    """Write seeds to files.  Returns their number."""
    os.makedirs(corpus, exist_ok=True)
    count = 0
    for sparse in (True, False):
        for seed in seeds(capture(binary, directory, sparse), sparse):
            with open(os.path.join(corpus, f'seed-{count:03}'), 'wb') as file:
                file.write(seed)
            count += 1
    return count


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').split('\n\n', maxsplit=1)[0])
    parser.add_argument('--seconds', type=float, default=30, metavar='N',
                        help='how long (default: %(default)g)')
    parser.add_argument('--qemu', metavar='BINARY',
                        default=f'{BUILD}/patched/qemu-system-x86_64',
                        help='a QEMU with the capability sparse-ram')
    parser.add_argument('--seed', type=int,
                        default=random.randrange(1 << 32),
                        help='of the random numbers (default: a new one)')
    parser.add_argument('--jobs', type=int, default=host.cpus(),
                        help='QEMUs at a time (default: %(default)s)')
    parser.add_argument('--save', metavar='DIR', default=f'{BUILD}/fuzz',
                        help='where a stream is saved that did harm')
    parser.add_argument('--corpus', metavar='DIR',
                        help='write seeds for ram-load-fuzz, and end')
    parser.add_argument('--replay', metavar='FILE',
                        help='give a saved stream to QEMU, and end')
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    check_binaries([args.qemu])
    with tempfile.TemporaryDirectory(prefix='fuzz-stream-') as directory:
        if args.corpus:
            count = write_corpus(args.qemu, directory, args.corpus)
            print(f'{count} seeds in {args.corpus}')
            return 0
        if args.replay:
            what = check(args.qemu, args.replay, not args.replay.endswith('-off'))
            print(what or 'nothing is wrong')
            return 1 if what else 0
        print(f'seed {args.seed}', flush=True)
        fuzzer = Fuzzer(args, directory)
        with ThreadPoolExecutor(args.jobs) as pool:
            for _ in pool.map(fuzzer.work, range(args.jobs)):
                pass
        print(f'{fuzzer.count} streams in {args.seconds:g} s: '
              f'{fuzzer.finding or "nothing found"}')
        return 1 if fuzzer.finding else 0


if __name__ == '__main__':
    sys.exit(run_main('fuzz-stream', lambda: run(parse_arguments())))
