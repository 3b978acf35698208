# SPDX-License-Identifier: GPL-2.0-or-later
"""A channel between two QEMUs that breaks where it is told to.

Whatever the source connects to the proxy with, the proxy connects to the
destination.  One thread moves all bytes, so that what happens after a number
of them happens exactly there.
"""

import os
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Set, Tuple

from lab.faults.cases import HALF, RESET, TO_DESTINATION, TO_SOURCE, Cut

_CHUNK = 16 * 1024

# Nothing is held for longer: when a source is about to complete, its monitor
# answers only when what it sends gets through.
_HOLD_SECONDS = 1.0
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def connect(uri: str) -> socket.socket:
    """Connect to unix:PATH or tcp:HOST:PORT."""
    kind, _, where = uri.partition(':')
    if kind == 'unix':
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(where)
        return sock
    host, _, port = where.rpartition(':')
    return socket.create_connection((host, int(port)))


def listen(uri: str) -> socket.socket:
    """Listen at unix:PATH, or at a free port for 'tcp'."""
    if uri.startswith('unix:'):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(uri[len('unix:'):])
    else:
        sock = socket.socket()
        sock.bind(('127.0.0.1', 0))
    sock.listen(16)
    return sock


@dataclass
class Flow:
    """One direction of a connection.

    passed: bytes that have got through.
    stops: what happens after how many of them, in this order.
    held: nothing gets through for now.
    ended: the source has no more to say.
    deaf: what it says is thrown away.
    """
    source: socket.socket
    sink: socket.socket
    passed: int = 0
    stops: List[Tuple[int, Callable[[], None]]] = field(default_factory=list)
    held: bool = False
    ended: bool = False
    deaf: bool = False
    pending: bytes = b''

    def room(self) -> int:
        """How much may be read now."""
        if self.held or self.ended or self.pending:
            return 0
        if self.deaf or not self.stops:
            return _CHUNK
        return max(0, min(_CHUNK, self.stops[0][0] - self.passed))

    def add_stop(self, after: int, action: Callable[[], None]) -> None:
        """Those for the same place happen in the order in which they came."""
        self.stops.append((after, action))
        self.stops.sort(key=lambda stop: stop[0])

    def is_due(self) -> bool:
        """Whether it has come to a stop that has not happened yet."""
        return (bool(self.stops) and self.passed >= self.stops[0][0]
                and not self.pending and not self.held)


@dataclass
class Link:
    """A connection, in both directions."""
    number: int
    flows: Dict[str, Flow] = field(default_factory=dict)
    closed: bool = False

    @property
    def sockets(self) -> List[socket.socket]:
        """Of the source and of the destination."""
        return [flow.source for flow in self.flows.values()]


class Proxy:
    """A context manager: listens on entry, closes everything on exit.

    uri: for the source to connect to.
    """

    def __init__(self, target: str, listen_at: str):
        """
        target: where the destination listens
        listen_at: 'tcp', or unix:PATH
        """
        self._target = target
        self._listener = listen(listen_at)
        self.uri = listen_at
        if listen_at == 'tcp':
            self.uri = f'tcp:127.0.0.1:{self._listener.getsockname()[1]}'
        self._links: List[Link] = []
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._todo: List[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._over = False
        self._refuse = False
        self._cuts: List[Cut] = []
        self._stops: List[Tuple[int, Callable[[], None]]] = []
        self._silent: List[socket.socket] = []
        self._reached: Set[str] = set()
        self._held_since: Optional[float] = None
        self.cut_happened: List[Cut] = []
        self.error: Optional[BaseException] = None

    def __enter__(self) -> 'Proxy':
        self._listener.setblocking(False)
        self._selector.register(self._listener, _READ)
        self._selector.register(self._wake, _READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._waker.send(b'!')
        self._thread.join()
        for link in self._links:
            self._close(link)
        for sock in (*self._silent, self._listener, self._wake, self._waker):
            sock.close()
        self._selector.close()
        if self.uri.startswith('unix:'):
            os.unlink(self.uri[len('unix:'):])

    def _do(self, action: Callable[[], None]) -> None:
        """Have the thread do something."""
        with self._lock:
            self._todo.append(action)
        self._waker.send(b'!')

    # To be called before the source connects

    def hold_at(self, name: str, after: int) -> None:
        """Stop the main channel after so many bytes, until release(), or for
        a second.
        """
        def hold() -> None:
            self._links[0].flows[TO_DESTINATION].held = True
            self._held_since = time.monotonic()
            self._reached.add(name)

        self._stops.append((after, hold))

    def do_at(self, name: str, after: int, action: Callable[[], None]) -> None:
        """Do something in the proxy's thread after so many bytes."""
        def act() -> None:
            action()
            self._reached.add(name)

        self._stops.append((after, act))

    def refuse(self) -> None:
        """Do not connect to the destination, but leave the source waiting."""
        self._refuse = True

    # At any time

    def cut(self, cut: Cut, from_now: bool = False) -> None:
        """Break a connection; from_now: count bytes from now on."""
        def arm() -> None:
            if cut.channel < len(self._links):
                link = self._links[cut.channel]
                if not link.closed:
                    passed = link.flows[cut.direction].passed
                    self._arm_cut(link, cut, passed if from_now else 0)
            else:
                self._cuts.append(cut)

        self._do(arm)

    def reached(self, name: str) -> bool:
        """Whether the main channel has come to this stop."""
        return name in self._reached

    def release(self) -> None:
        """Go on after a stop."""
        self._do(self._go_on)

    # The thread

    def _run(self) -> None:
        try:
            while not self._over:
                held = self._held_since
                for key, events in self._selector.select(
                        None if held is None else _HOLD_SECONDS / 10):
                    self._event(key, events)
                if held and time.monotonic() - held > _HOLD_SECONDS:
                    self._go_on()
                self._handle_stops()
        except BaseException as err:
            self.error = err

    def _go_on(self) -> None:
        self._held_since = None
        if self._links and not self._links[0].closed:
            self._links[0].flows[TO_DESTINATION].held = False

    def _event(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif key.fileobj is self._wake:
            self._wake.recv(_CHUNK)
            with self._lock:
                todo, self._todo = self._todo, []
            for action in todo:
                action()
        else:
            link: Link = key.data
            if link.closed:
                return
            for flow in link.flows.values():
                if events & _READ and flow.source is key.fileobj:
                    self._read(link, flow)
                if events & _WRITE and flow.sink is key.fileobj:
                    self._write(link, flow)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        link = Link(len(self._links))
        self._links.append(link)
        try:
            if self._refuse:
                other, silent = socket.socketpair()
                self._silent.append(silent)
            else:
                other = connect(self._target)
        except OSError:                 # the destination is gone
            link.closed = True
            sock.close()
            return
        other.setblocking(False)
        link.flows = {TO_DESTINATION: Flow(sock, other), TO_SOURCE: Flow(other, sock)}
        if link.number == 0:
            for stop in self._stops:
                link.flows[TO_DESTINATION].add_stop(*stop)
        for cut in self._cuts:
            if cut.channel == link.number:
                self._arm_cut(link, cut, 0)

    def _arm_cut(self, link: Link, cut: Cut, base: int) -> None:
        link.flows[cut.direction].add_stop(base + cut.after,
                                           lambda: self._break(link, cut))

    def _handle_stops(self) -> None:
        for link in self._links:
            for flow in link.flows.values():
                while not link.closed and flow.is_due():
                    flow.stops.pop(0)[1]()
        for link in self._links:
            self._update(link)

    def _break(self, link: Link, cut: Cut) -> None:
        self.cut_happened.append(cut)
        for each in list(self._links) if cut.everywhere else [link]:
            if each.closed:
                continue
            if cut.how == HALF:
                flow = each.flows[cut.direction]
                flow.deaf = True
                self._end(flow)
            else:
                self._close(each, reset=cut.how == RESET)

    def _read(self, link: Link, flow: Flow) -> None:
        room = flow.room()
        if not room:
            return
        try:
            data = flow.source.recv(room)
        except BlockingIOError:
            return
        except OSError:
            data = b''
        if not data:
            flow.ended = True
            if not flow.pending:
                self._end(flow)
        elif not flow.deaf:
            flow.pending = data
            self._write(link, flow)

    def _write(self, link: Link, flow: Flow) -> None:
        if not flow.pending:
            return
        try:
            sent = flow.sink.send(flow.pending)
        except BlockingIOError:
            return
        except OSError:                 # nobody is there any more
            self._close(link)
            return
        flow.passed += sent
        flow.pending = flow.pending[sent:]
        if flow.ended and not flow.pending:
            self._end(flow)

    @staticmethod
    def _end(flow: Flow) -> None:
        """Let the sink see the end of the stream."""
        try:
            flow.sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _update(self, link: Link) -> None:
        """Wait for what can be done next."""
        if link.closed:
            return
        flows = link.flows.values()
        if all(flow.ended and not flow.pending for flow in flows):
            self._close(link)
            return
        for sock in link.sockets:
            events = 0
            for flow in flows:
                if flow.source is sock and flow.room():
                    events |= _READ
                if flow.sink is sock and flow.pending:
                    events |= _WRITE
            self._watch(sock, events, link)

    def _watch(self, sock: socket.socket, events: int, link: Link) -> None:
        known = self._selector.get_map().get(sock.fileno())
        if known and not events:
            self._selector.unregister(sock)
        elif known and known.events != events:
            self._selector.modify(sock, events, link)
        elif not known and events:
            self._selector.register(sock, events, link)

    def _close(self, link: Link, reset: bool = False) -> None:
        if link.closed:
            return
        link.closed = True
        for sock in link.sockets:
            if sock.fileno() in self._selector.get_map():
                self._selector.unregister(sock)
            if reset and sock.family == socket.AF_INET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                struct.pack('ii', 1, 0))
            sock.close()
