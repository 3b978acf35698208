# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU 10.0 itself does wrong, without our patches as well.

Each of these was seen with the stock QEMU (faults --patched STOCK
--not-sparse).  A case that runs into one is reported under its name; all that
the bug has nothing to do with is still checked.
"""

import signal
import threading
from collections import deque
from typing import TYPE_CHECKING, Deque, Dict, List, Optional

from lab.faults.cases import Case
from lab.faults.sides import Side, threads

if TYPE_CHECKING:
    from lab.faults.attempt import Ending

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

# When a channel ends in its first 4 bytes, the destination goes on looking for
# the rest in migration_channel_read_peek(), with its monitor, for ever.
CHANNEL_SHORT = 'multifd: destination waits for the first bytes of a channel'

# When a channel ends before its first packet, the destination says so, and then
# goes on waiting for another one.  The source waits until all is read, at the
# end with its monitor.
CHANNEL_IGNORED = 'multifd: both wait after a channel has failed to start'
_IGNORED = ('Failed to peek at channel', 'failed to receive packet via multifd channel')

# When postcopy fails on the destination before the guest runs there,
# process_incoming_migration_co() frees what the threads of postcopy still use.
POSTCOPY_EARLY = 'postcopy: destination crashes when it fails before it runs'

# When the destination dies before it has answered the first ping, the source of
# postcopy-preempt waits for that in migration_wait_main_channel() for ever; the
# guest runs on.
PREEMPT_PONG = 'postcopy-preempt: source waits for an answer of who is gone'

# When the channel breaks once more while it is being recovered,
# postcopy_preempt_thread() goes on with a channel that is not there any more.
PREEMPT_RECOVER = 'postcopy-preempt: SIGSEGV when recovery is interrupted'

# When multifd is cancelled at the moment at which it is set up or fails, the
# state stays "cancelling", although the migration has ended and is cleaned up.
MULTIFD_CANCEL = 'multifd: source says that it is cancelling for ever'

# How often to look, in seconds, and for how long a thread has to be seen
# waiting, in three looks of four
_INTERVAL = 0.2
HANG_SECONDS = 2.4


def has_migration_thread(side: Side) -> bool:
    """Whether a source is at work."""
    return any(name.startswith('mig/src') for name in _threads(side.pid))


# What QEMU calls its threads (-name debug-threads=on)
_CHANNELS = {'destination': 'mig/dst/recv', 'source': 'mig/src/send'}
_MIGRATION = 'mig/src/main'


def _threads(pid: int) -> Dict[str, List[str]]:
    """Where the threads of a process wait, by their names."""
    found: Dict[str, List[str]] = {}
    for number, name, where in threads(pid):
        found.setdefault('main' if number == pid else name, []).append(where)
    return found


def waits_for_channel(name: str, waiting: Dict[str, List[str]], channels: int) -> bool:
    """Who waits for the channels waits, and not all of those are there.

    name: of the side; waiting: as _threads() returns it.
    """
    def waits(thread: str) -> bool:
        return any('futex' in where for where in waiting.get(thread, ()))

    there = sum(len(each) for thread, each in waiting.items()
                if thread.startswith(_CHANNELS[name]))
    return (there < channels and waits('main' if name == 'destination' else _MIGRATION))


class MultifdWatch(threading.Thread):
    """Kills a side that hangs because of one of these bugs of multifd.

    found: the name of the bug, '' if none has happened.
    """

    def __init__(self, side: Side, channels: int,
                 destination: Optional[Side] = None,
                 seconds: float = HANG_SECONDS):
        """
        channels: of multifd, without the main one
        destination: of a source
        seconds: for which it has to wait until it counts as hanging
        """
        super().__init__(daemon=True)
        self._side = side
        self._channels = channels
        self._destination = destination
        self._seen = round(seconds / _INTERVAL)
        self._over = threading.Event()
        self.found = ''

    def _symptom(self) -> str:
        """What it looks like now."""
        waiting = _threads(self._side.pid)
        if waits_for_channel(self._side.name, waiting, self._channels):
            return MULTIFD_END[self._side.name]
        if not self._destination:
            return (CHANNEL_SHORT if 'nanosleep' in ''.join(
                waiting.get('main', ())) else '')
        if 'futex' in ''.join(waiting.get(_MIGRATION, ())) and \
                any(text in self._destination.said() for text in _IGNORED):
            return CHANNEL_IGNORED
        return ''

    def run(self) -> None:
        looks: Deque[str] = deque(maxlen=self._seen * 4 // 3)
        while not self._over.wait(_INTERVAL):
            symptom = self._symptom()
            looks.append(symptom)
            if symptom and looks.count(symptom) >= self._seen:
                self.found = symptom
                self._side.kill()
                return

    def stop(self) -> None:
        """There is nothing more to be seen."""
        self._over.set()
        self.join()


def recognize(case: Case, ending: 'Ending', destination_status: Optional[int]) -> str:
    """The name of the bug that a case has run into, '' if none.

    destination_status: its exit status, or minus the signal.
    """
    if case.how.postcopy and ending.source == 'failed' and \
            ending.destination in ('completed', 'postcopy-paused') and \
            ending.happened:
        return POSTCOPY_END
    if ending.source == 'cancelling' and 'multifd' in case.how.capabilities:
        return MULTIFD_CANCEL
    if ending.source == 'active' and destination_status is not None and \
            'postcopy-preempt' in case.how.capabilities:
        return PREEMPT_PONG
    crashed = destination_status in (-signal.SIGSEGV, -signal.SIGABRT)
    if case.how.postcopy and crashed and not ending.ran:
        return POSTCOPY_EARLY
    if 'postcopy-preempt' in case.how.capabilities and \
            destination_status == -signal.SIGSEGV and ending.recoveries:
        return PREEMPT_RECOVER
    if case.mode == 'mapped-ram-multifd' and \
            destination_status == -signal.SIGSEGV and \
            case.fault in ('truncate', 'tmpfs-full', 'kill-source', 'cancel'):
        return MAPPED_RAM_SHORT
    return ''
