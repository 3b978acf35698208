# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scripts' command lines have in common."""

import argparse
import os
import shlex
import signal
import sys
from typing import Callable, Iterable, Optional

from lab import UserError, memory, qemu, terminal
from lab.base import BUILD
from lab.memory import MIB, SMALLEST
from lab.migrate import MigrationFailed
from lab.qemu import GuestError, import_qemu


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def say_failed(text: str) -> None:
    """What went wrong, so that nobody overlooks it."""
    word = terminal.paint('FAILED', terminal.RED, sys.stderr)
    say(f'{word}: {text}')


def guest_size(text: str) -> int:
    """A size of guest RAM, as a type of argparse's."""
    try:
        value = memory.parse_size(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    if value < SMALLEST or value % MIB:
        raise argparse.ArgumentTypeError(
            f'{text} is not a whole number of MiB, 64 or more')
    return value


def add_binary_arguments(parser: argparse.ArgumentParser) -> None:
    """Which QEMUs to start."""
    parser.add_argument('--patched', metavar='FILE',
                        default=f'{BUILD}/patched/qemu-system-x86_64',
                        help='the patched QEMU')
    parser.add_argument('--stock', metavar='FILE',
                        default=f'{BUILD}/stock/qemu-system-x86_64',
                        help='the QEMU to compare with')
    parser.add_argument('--qemu-python', metavar='DIR', default=qemu.PYTHON,
                        help="where QEMU's own qemu.machine is")


def add_qemu_arguments(parser: argparse.ArgumentParser) -> None:
    """Which QEMUs to start, and how."""
    add_binary_arguments(parser)
    parser.add_argument('--accel', choices=('tcg', 'kvm'),
                        help='default: kvm where the processor has '
                             'hardware virtualization, else tcg')
    parser.add_argument('--qemu-args', metavar='ARGS', type=shlex.split,
                        default=shlex.split(os.environ.get('QEMU_ARGS', '')),
                        help='more arguments for every QEMU, one string '
                             '(default: $QEMU_ARGS)')


def add_size_arguments(parser: argparse.ArgumentParser, size: int,
                       stock_size: int) -> None:
    """How large guests are, by default."""
    parser.add_argument('--size', type=guest_size, default=size,
                        help='guest RAM, at most, for the patched QEMU '
                             f'(default {memory.format_size(size)})')
    parser.add_argument('--stock-size', type=guest_size, default=stock_size,
                        help='guest RAM, at most, where it fills up '
                             f'(default {memory.format_size(stock_size)})')


def check_binaries(paths: Iterable[Optional[str]]) -> None:
    """Raise UserError unless all the binaries are there."""
    missing = [path for path in paths if path and not os.access(path, os.X_OK)]
    if missing:
        raise UserError(f"there is no {' and no '.join(missing)}: "
                        "run 'make qemu stock' first")


def ready(args: argparse.Namespace, *more: Optional[str]) -> None:
    """Raise UserError unless the QEMUs are there; more: others than the two."""
    memory.require_linux()
    check_binaries((args.patched, args.stock, *more))
    import_qemu(args.qemu_python)


def memory_floor() -> int:
    """Bytes of memory that have to stay available on this machine."""
    return min(memory.GIB, memory.total() // 8)


def _interrupt(number: int, _: object) -> None:
    """Signal handler: clean up, and do not let that be interrupted."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def run_main(name: str, run: Callable[[], int]) -> int:
    """Call run(), which returns the exit status; say what goes wrong.

    Whatever ends it, also a signal, unwinds the stack.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return run()
    except UserError as err:
        say(f'{name}: {err}')
        return 2
    except (MigrationFailed, GuestError) as err:
        say(f'{name}: {err}')
        return 1
