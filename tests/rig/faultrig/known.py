# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU 10.0 itself does wrong, without our patches as well.

Each of these was seen with the stock QEMU (faults --patched STOCK
--not-sparse).  A case that runs into one is reported under its name; all that
the bug has nothing to do with is still checked.
"""

import glob
import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Dict, List, Optional

from .cases import Case
from .sides import Side

if TYPE_CHECKING:
    from .attempt import Ending

# When the channel breaks after the source of postcopy has sent the last page,
# it fails instead of pausing (migration_completion()), although the guest runs
# on the destination.  There is no way back from that.
POSTCOPY_END = 'postcopy: source fails at its end'

# When a multifd channel ends between two packets, or its thread has an error,
# the destination waits for that thread in multifd_recv_sync_main(), with its
# monitor, and the source in multifd_send_sync_main(), at the end with its
# monitor as well, for ever.
MULTIFD_END = {
    'destination': 'multifd: destination waits for a channel that has ended',
    'source': 'multifd: source waits for a channel that has ended'}

# When a file ends early, multifd_file_recv_data() adds to an error that is not
# there.
MAPPED_RAM_SHORT = 'mapped-ram with multifd: SIGSEGV at a short read'

# With exit-on-error=false, when postcopy fails on the destination before the
# guest runs there, process_incoming_migration_co() frees what the threads of
# postcopy still use.
POSTCOPY_EARLY = 'postcopy: destination crashes when it fails before it runs'

# When the destination pauses again and again
PREEMPT_RECOVER = 'postcopy-preempt: SIGSEGV after several recoveries'

# When multifd is cancelled at the moment at which it is set up or fails, the
# state stays "cancelling", although the migration has ended and is cleaned up.
MULTIFD_CANCEL = 'multifd: source says that it is cancelling for ever'

# Seconds for which a thread has to be waiting
_PATIENCE = 3.0
_INTERVAL = 0.2


def has_migration_thread(side: Side) -> bool:
    """Whether a source is at work."""
    return any(name.startswith('mig/src') for name in _threads(side.pid))


# What QEMU calls its threads (-name debug-threads=on)
_CHANNELS = {'destination': 'mig/dst/recv', 'source': 'mig/src/send'}
_MIGRATION = 'mig/src/main'


def _threads(pid: int) -> Dict[str, List[str]]:
    """Where the threads of a process wait, by their names."""
    found: Dict[str, List[str]] = {}
    for task in glob.glob(f'/proc/{pid}/task/*'):
        with suppress(OSError), \
             open(f'{task}/comm', encoding='utf-8') as comm, \
             open(f'{task}/wchan', encoding='ascii') as wchan:
            name = ('main' if os.path.basename(task) == str(pid)
                    else comm.read().strip())
            found.setdefault(name, []).append(wchan.read())
    return found


def waits_for_channel(name: str, threads: Dict[str, List[str]],
                      channels: int) -> bool:
    """Who waits for the channels waits, and not all of those are there.

    name: of the side; threads: as _threads() returns them.
    """
    def waits(thread: str) -> bool:
        return any('futex' in wchan for wchan in threads.get(thread, ()))

    there = sum(len(each) for thread, each in threads.items()
                if thread.startswith(_CHANNELS[name]))
    return (there < channels
            and waits('main' if name == 'destination' else _MIGRATION))


class MultifdWatch(threading.Thread):
    """Kills a side that MULTIFD_END has happened to.

    found: the name of the bug, '' if it has not happened.
    """

    def __init__(self, side: Side, channels: int):
        """channels: of multifd, without the main one"""
        super().__init__(daemon=True)
        self._side = side
        self._channels = channels
        self._over = threading.Event()
        self.found = ''

    def run(self) -> None:
        name = self._side.name
        seen = 0.0
        while not self._over.wait(_INTERVAL):
            seen = (seen + _INTERVAL
                    if waits_for_channel(name, _threads(self._side.pid),
                                         self._channels) else 0.0)
            if seen >= _PATIENCE:
                self.found = MULTIFD_END[name]
                self._side.kill()
                return

    def stop(self) -> None:
        """There is nothing more to be seen."""
        self._over.set()
        self.join()


def recognize(case: Case, ending: 'Ending',
              destination_status: Optional[int]) -> str:
    """The name of the bug that a case has run into, '' if none.

    destination_status: its exit status, or minus the signal.
    """
    if case.how.postcopy and ending.source == 'failed' and \
            ending.destination in ('completed', 'postcopy-paused') and \
            ending.happened:
        return POSTCOPY_END
    if ending.source == 'cancelling' and 'multifd' in case.how.capabilities:
        return MULTIFD_CANCEL
    crashed = destination_status in (-signal.SIGSEGV, -signal.SIGABRT)
    if case.how.postcopy and crashed and not case.exit_on_error and \
            not ending.ran:
        return POSTCOPY_EARLY
    if 'postcopy-preempt' in case.how.capabilities and \
            destination_status == -signal.SIGSEGV and ending.recoveries > 1:
        return PREEMPT_RECOVER
    if case.mode == 'mapped-ram-multifd' and \
            destination_status == -signal.SIGSEGV and \
            case.fault in ('truncate', 'tmpfs-full', 'kill-source', 'cancel'):
        return MAPPED_RAM_SHORT
    return ''
