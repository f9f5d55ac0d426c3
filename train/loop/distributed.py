"""Lines of a job, and the early end of a run: by a signal, or by the loss of a process of the job.

Threads detect both, because the main thread is inside mlx most of the time: Python runs no signal
handler there, and a collective operation may wait for a lost process forever.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_snapgen.cli.notices import write_line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 0.2
"""Seconds between signals that have one cause."""


def print_once(text: str) -> None:
    """Print a line on stderr, in the first process of a job only."""
    if mx.distributed.init().rank() == 0:
        write_line(text)


class StopSignals:
    """In the block, the first Ctrl-C, SIGTERM or SIGHUP calls `stop`; a second signal, except
    SIGHUP, ends the process.

    `stop` gets the signal's number, and runs in a thread, which may have to wait for seconds while
    mlx compiles a step. Signals within `SAME` seconds of the first are not a second one: `timeout`
    and job managers signal both a process and its group. SIGHUP is never one: both the shell and
    the system send it when a terminal is closed.
    """

    def __init__(self, stop: Callable[[int], None]):
        self._stop = stop
        self._closed: int | None = None

    def print(self, text: str) -> None:
        """Print a line on stderr; after SIGHUP if it still can be, as in a file."""
        if self._closed is None:
            print(text, file=sys.stderr)
            return
        with contextlib.suppress(OSError):  # the terminal, or a program that read the output
            os.write(self._closed, f"{text}\n".encode(errors="backslashreplace"))

    def __enter__(self) -> "StopSignals":
        # An ignored signal, such as SIGHUP under nohup, stays ignored.
        mine = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._previous = {n: signal.signal(n, lambda *_: None) for n in mine}
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._sender.close()

    def _listen(self) -> None:
        first = None
        while received := self._receiver.recv(1):
            number = received[0]
            if number not in self._previous:
                continue
            if first is not None:
                if time.monotonic() - first > SAME and number != signal.SIGHUP:
                    os._exit(128 + number)
                continue
            first = time.monotonic()
            if number == signal.SIGHUP:
                # The terminal is closed; a bar that is printed there would end the run.
                self._closed, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
                for stream in (1, 2):
                    if not stat.S_ISREG(os.fstat(stream).st_mode):
                        os.dup2(nowhere, stream)
            self._stop(number)
        self._receiver.close()


BEAT = 1.0
"""Seconds between two heartbeats."""
SILENCE = 60.0
"""Seconds without a heartbeat after which a process counts as lost."""
HANDSHAKE = 30.0
"""Seconds in which all processes must meet, after the first has heard of all."""
GRACE = 2.0
"""Seconds after a loss in which the main thread can end by itself, with its own message."""

_ALIVE, _GOODBYE = b".", b"q"
_HELLO = struct.Struct("!16sI")


class PeerWatch:
    """Detects, on any backend, a process of the job that died, hangs or lost its network.

    Process 0 keeps a TCP connection to each other one, with a byte each way every `BEAT` seconds.
    When a connection ends without a goodbye or stays silent, `lost` is called from a thread with
    the rank of the process at its other end.
    """

    def __init__(self, group: mx.distributed.Group, lost: Callable[[int], None]):
        self._lost, self._closed = lost, False
        self._connections: list[socket.socket] = []
        self._watched: set[int] = set()
        if group.size() > 1:
            try:
                self._meet(group)
                self._check_complete(group)
            except (RuntimeError, ValueError):
                # Of mlx, which may notice the loss first, or of its sum without the lost process,
                # which has whatever was in memory: no JSON.
                self._fail(group)
                raise

    def _meet(self, group: mx.distributed.Group) -> None:
        host = _host_of_first()
        if group.rank() == 0:
            self._server = _listener(host)
            self._token = secrets.token_bytes(16)
            port = self._server.getsockname()[1]
            _broadcast(group, [host or socket.gethostname(), port, self._token.hex()])
            threading.Thread(target=self._accept, args=(group.size(),), daemon=True).start()
            return
        host, port, token = _broadcast(group, None)
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.sendall(_HELLO.pack(bytes.fromhex(token), group.rank()))
        except OSError as error:
            print(
                f"process {group.rank()} cannot watch process 0 at {host}:{port} ({error}): "
                "if one dies, the other may wait forever",
                file=sys.stderr,
            )
            return
        self._start(0, connection)

    def _check_complete(self, group: mx.distributed.Group) -> None:
        """Call `lost` if a process ended before it was watched: then mlx may wait for ever."""
        timer = threading.Timer(HANDSHAKE, self._fail, (group,))
        timer.daemon = True
        timer.start()
        complete = is_complete(group)
        timer.cancel()
        if not complete:
            self._fail(group)

    def _fail(self, group: mx.distributed.Group) -> None:
        """Call `lost` with the rank of a process that is not there."""
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        if self._watched.issuperset(others):
            time.sleep(2 * GRACE)  # the watch calls `lost` with the rank
        self._lost(next((rank for rank in others if rank not in self._watched), others[0]))

    def close(self, orderly: bool) -> None:
        """End the watch; if `orderly`, the other processes do not treat this process as lost."""
        self._closed = True
        for connection in self._connections:
            try:
                if orderly:
                    connection.sendall(_GOODBYE)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def _accept(self, count: int) -> None:
        while len(self._connections) < count - 1:
            connection, _ = self._server.accept()
            connection.settimeout(10)
            try:
                token, rank = _HELLO.unpack(connection.recv(_HELLO.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                token, rank = b"", 0
            if secrets.compare_digest(token, self._token):
                self._start(rank, connection)
            else:
                connection.close()
        self._server.close()

    def _start(self, rank: int, connection: socket.socket) -> None:
        self._connections.append(connection)
        self._watched.add(rank)
        threading.Thread(target=self._watch, args=(rank, connection), daemon=True).start()

    def _watch(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(BEAT)
        heard = time.monotonic()
        while time.monotonic() - heard < SILENCE:
            try:
                connection.sendall(_ALIVE)
                received = connection.recv(64)
            except TimeoutError:
                continue
            except OSError:
                break
            if _GOODBYE in received:
                return
            if not received:
                break
            heard = time.monotonic()
            time.sleep(BEAT)
        time.sleep(GRACE)
        if not self._closed:
            self._lost(rank)


def _listener(host: str | None) -> socket.socket:
    """A socket on the network that the processes share, or on all networks if it is unknown."""
    try:
        return socket.create_server((host or "", 0))
    except OSError:
        return socket.create_server(("", 0))


def _host_of_first() -> str | None:
    """Address of process 0 by the environment that mlx.launch sets; None with MPI."""
    if path := os.environ.get("MLX_HOSTFILE"):
        return json.loads(Path(path).read_text())[0][0].rsplit(":", 1)[0]
    if address := os.environ.get("MLX_JACCL_COORDINATOR"):
        return address.rsplit(":", 1)[0]
    return os.environ.get("NCCL_HOST_IP")


def _broadcast(group: mx.distributed.Group, value: list | None) -> list:
    """Send process 0's `value`, as JSON, to every process."""
    text = json.dumps(value).encode() if value is not None else b""
    padded = mx.array(list(text.ljust(512, b" " if text else b"\0")), mx.int32)
    shared = mx.distributed.all_sum(padded, group=group)
    return json.loads(np.array(shared).astype(np.uint8).tobytes())


def is_complete(group: mx.distributed.Group) -> bool:
    """Whether all processes take part. Without one, mlx may return wrong sums, or wait for ever."""
    count = mx.distributed.all_sum(mx.array(1.0), group=group)
    return float(np.array(count)) == group.size()
