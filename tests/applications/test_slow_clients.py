"""Clients of the server that take their time: each is given up, and nobody else waits for them."""

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager

import pytest

from tests.applications.serving import KIND, NO_SERVER, encoded

pytest.importorskip("starlette", reason=NO_SERVER)
pytest.importorskip("uvicorn", reason=NO_SERVER)
pytest.importorskip("python_multipart", reason=NO_SERVER)

from apps.server import app, connection, uploads
from apps.server.jobs import Drawing
from apps.server.models import Served
from apps.server.request import Limits
from apps.worker.messages import Finished, Picture, Progress
from mlx_snapgen.settings import ModelChoice

HEAD = (
    b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
FORM = HEAD.replace(b"generations", b"edits").replace(b"application/json", KIND.encode())
FORM += b"Content-Length: 1000\r\n\r\n" + encoded(("image", bytes(200)))[:150]
BODY = json.dumps({"prompt": "a cat", "stream": True}).encode()
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
PREVIEWS, PREVIEW = 6, bytes(1 << 20)
PATIENCE = 60


class Jobs:
    """Draws at once, much: what a client can be slow to read."""

    served = restarts = 0
    stalled = False

    def __init__(self):
        self.cancelled = []

    def __len__(self):
        return 0

    def submit(self, job):
        drawing = Drawing(1)
        for index in range(PREVIEWS):
            drawing.put(Progress(1, 0, index, PREVIEWS, 7, (32, 32), PREVIEW))
        drawing.put(Picture(1, 0, (32, 32), b"", PREVIEW, "cat", {"seed": 7}, 1.0))
        drawing.put(Finished(1))
        return drawing

    def cancel(self, drawing):
        self.cancelled.append(drawing)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.6)
    monkeypatch.setattr(uploads, "FORM_SECONDS", 0.6)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.6)
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.5)
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.6)
    monkeypatch.setattr(connection, "TICK", 0.1)


@asynccontextmanager
async def serving(config):
    """(port, jobs, uvicorn's server)."""
    jobs = Jobs()
    models = {"random": Served("random", ModelChoice(), config)}
    routes = app.Server(jobs, models, limits=Limits())
    server = connection.make_server(app.create_app(routes, None))
    sock = socket.create_server(("127.0.0.1", 0), backlog=512)
    running = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(PATIENCE):
        yield sock.getsockname()[1], jobs, server
    server.should_exit = True
    await running
    sock.close()


async def health(port):
    """Status of an answer that nothing holds up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    status = int(answer.split()[1])
    if status != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
    return status


async def trickle(port, data, every=0.1):
    """Send some data at once, the rest byte by byte; (what came back, seconds until the end)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data[0])
    started, reading = time.monotonic(), asyncio.ensure_future(reader.read())
    for byte in data[1]:
        await asyncio.sleep(every)
        if reading.done():
            break
        writer.write(bytes([byte]))
    try:
        answer = await reading
    except ConnectionError:
        answer = b""
    writer.close()
    return answer, time.monotonic() - started


def test_bytes_now_and_then_do_not_keep_a_connection(components):
    """In the head, in the body, and in a body that nobody asked for."""
    endless = bytes(1000)
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    slow = {
        "silent": (b"", b""),
        "head": (b"", HEAD + b"X: " + b"y" * 1000),
        "body": (HEAD + b"Content-Length: 1000\r\n\r\n", endless),
        "form": (FORM, endless),
        "unasked": (get, endless),
    }

    async def run():
        async with serving(components.config) as (port, _, server):
            tasks = [asyncio.ensure_future(trickle(port, data)) for data in slow.values()]
            statuses = []
            while not all(task.done() for task in tasks):
                started = time.monotonic()
                statuses.append((await health(port), time.monotonic() - started))
                await asyncio.sleep(0.1)
            return [await task for task in tasks], statuses, len(server.server_state.connections)

    ended, statuses, still_open = asyncio.run(run())
    answers = dict(zip(slow, (answer for answer, _ in ended), strict=True))
    assert answers["silent"] == answers["head"] == b""
    assert answers["body"].startswith(b"HTTP/1.1 408 ")
    assert answers["form"].startswith(b"HTTP/1.1 408 ")
    assert answers["unasked"].startswith(b"HTTP/1.1 200 ")
    assert all(status == 200 for status, _ in statuses)
    assert max(seconds for _, seconds in statuses) < 0.5 * PATIENCE
    assert still_open <= 1  # the last polite one


def test_a_fault_of_the_server_is_json_too(components, monkeypatch):
    monkeypatch.setattr(Jobs, "stalled", property(lambda self: 1 / 0), raising=True)

    async def run():
        async with serving(components.config) as (port, *_):
            return await health(port)

    assert asyncio.run(run()) == 500


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("path", ["generations", "edits"])
def test_a_large_body_that_is_refused_at_once_is_read_all_the_same(components, path, more):
    """Slowly, for longer than a silent client may wait: clients send all before they read."""

    async def send(port, size):
        head = {"generations": HEAD, "edits": FORM.partition(b"Content-Length")[0]}[path]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + more + b"Content-Length: %d\r\n\r\n" % (70 << 20))
        first = await reader.readexactly(12)
        for _ in range(size // (1 << 20)):
            writer.write(bytes(1 << 20))
            await writer.drain()
            await asyncio.sleep(0.03)
        rest = await reader.read()
        writer.close()
        return first + rest

    async def run():
        async with serving(components.config) as (port, *_):
            return await send(port, 40 << 20)

    answer = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 413 ") and b"is larger than" in answer


BROKEN = {
    "old": (HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n", b"413"),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nno chunk of %d bytes\r\n", b"400"),
    "path": (
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n",
        b"404",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_connection_that_is_closed_reads_what_its_client_still_sends(components, name):
    """By a client that reads when it has sent all, as most do."""
    head, status = BROKEN[name]

    def send(port):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            client.sendall(head % (20 << 20))
            for _ in range(20):
                client.sendall(bytes(1 << 20))
            return client.makefile("rb").read()

    async def run():
        async with serving(components.config) as (port, _, server):
            answer = await asyncio.to_thread(send, port)
            while server.server_state.connections:
                await asyncio.sleep(0.01)
            return answer

    answer = asyncio.run(run())
    assert answer.split()[1] == status and answer.endswith(b"}")


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_a_refused_body_is_not_read_without_end(components, monkeypatch, more):
    monkeypatch.setattr(connection, "MAX_DRAINED", 1 << 20)

    async def run():
        async with serving(components.config) as (port, *_):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + more + b"Transfer-Encoding: chunked\r\n\r\n")
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"80000\r\n%b\r\n" % bytes(1 << 19))
                    await writer.drain()
                    await asyncio.sleep(0.02)

    asyncio.run(run())


def test_silent_crowds_keep_nobody_out_for_long(components, monkeypatch):
    monkeypatch.setattr(connection, "CONNECTIONS", 20)

    async def run():
        async with serving(components.config) as (port, *_):
            crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
            first = await health(port)
            while (status := await health(port)) == 503:
                await asyncio.sleep(0.1)
            for _, writer in crowd:
                writer.close()
            return first, status

    assert asyncio.run(run()) == (503, 200)


def test_who_does_not_read_is_left(components):
    async def run():
        async with serving(components.config) as (port, jobs, server):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(REQUEST)
                while not server.server_state.connections:
                    await asyncio.sleep(0.01)
                answers = []
                while server.server_state.connections or not jobs.cancelled:
                    answers.append(await health(port))
                    await asyncio.sleep(0.1)
                return answers, len(jobs.cancelled)

    answers, cancelled = asyncio.run(run())
    assert set(answers) == {200}
    assert cancelled == 1


def test_who_reads_slowly_but_reads_gets_everything(components):
    async def run():
        async with serving(components.config) as (port, *_):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
            writer.write(REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
            started, data = time.monotonic(), bytearray()
            while chunk := await reader.read(1 << 17):
                data += chunk
                await asyncio.sleep(0.02)
            writer.close()
            return data, time.monotonic() - started

    data, seconds = asyncio.run(run())
    assert seconds > 2 * 0.6
    assert data.count(b"event: image_generation.partial_image") == PREVIEWS
    assert data.count(b"event: image_generation.completed") == 1
