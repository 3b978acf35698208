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
from typing import Dict, List, Optional

from .attempt import Ending
from .cases import Case
from .sides import Side

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

# Seconds for which a thread has to be waiting
_PATIENCE = 3.0
_INTERVAL = 0.2


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


def recognize(case: Case, ending: Ending,
              destination_status: Optional[int]) -> str:
    """The name of the bug that a case has run into, '' if none.

    destination_status: its exit status, or minus the signal.
    """
    if case.how.postcopy and ending.source == 'failed' and \
            ending.destination in ('completed', 'postcopy-paused') and \
            ending.happened:
        return POSTCOPY_END
    if case.mode == 'mapped-ram-multifd' and \
            destination_status == -signal.SIGSEGV and \
            case.fault in ('truncate', 'tmpfs-full', 'kill-source', 'cancel'):
        return MAPPED_RAM_SHORT
    return ''
