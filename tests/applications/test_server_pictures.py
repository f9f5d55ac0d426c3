"""Edits and variations: forms with pictures, from OpenAI's client and from rude ones."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.pipeline import SnapGenPipeline
from tests.applications.serving import (
    KIND,
    NO_SERVER,
    ask,
    encoded,
    hole,
    opened,
    picture,
    start,
    stop,
)
from tests.tiny import require

pytest.importorskip("starlette", reason=NO_SERVER)
pytest.importorskip("uvicorn", reason=NO_SERVER)
pytest.importorskip("python_multipart", reason=NO_SERVER)
from starlette.requests import Request

from apps.server import uploads
from apps.server.errors import RequestError

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The server's folder for temporary files."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def port(model_folder, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        process, port = start("--model", model_folder, "--max-pixels", 8192)
    yield port
    stop(process)


@pytest.fixture(autouse=True)
def nothing_stays(folder):
    yield
    # A stream's client has everything a moment before the server ends the request.
    end = time.monotonic() + 10
    while list(folder.glob(".snapgen-*")):
        assert time.monotonic() < end, "pictures of a client stayed"
        time.sleep(0.05)


def send(port, path, *parts):
    return ask(port, path=path, headers={"Content-Type": KIND}, data=encoded(*parts))


def saved(data, path):
    path.write_bytes(base64.b64decode(data["b64_json"]))
    return path


# --- edits --------------------------------------------------------------------------------------


def test_an_edit_starts_from_the_picture(port, model_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(80, 80))
    wish = [("prompt", "a red apple"), ("n", 2), ("seed", 5), ("steps", 4), ("strength", "0.5")]
    status, _, answer = send(port, EDITS, ("image", picture(80, 80)), *wish, ("fit", "pad"))
    assert status == 200, answer
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    expected = pipe("a red apple", image=tmp_path / "a.png", strength=0.5, seed=5, fit="pad",
                    num_inference_steps=4, num_images=2)  # fmt: skip
    for data, image in zip(answer["data"], expected, strict=True):
        assert np.array_equal(np.array(opened(data["b64_json"])), np.array(image))
    assert answer["size"] == "{}x{}".format(*expected[0].size)
    assert any("padded" in notice for notice in answer["notices"])
    found = read_metadata(saved(answer["data"][0], tmp_path / "b.png"))
    assert (found["strength"], found["fit"]) == (0.5, "pad")
    assert found["image"]["name"] == "my picture.png"
    answer = send(port, EDITS, ("image[]", picture(80, 80)), ("size", "32x64"), *wish)[2]
    assert answer["size"] == "32x64"


def test_an_edited_picture_is_enlarged(port):
    wish = (IMAGE, PROMPT, ("steps", 2), ("seed", 1))
    small = send(port, EDITS, *wish, ("size", "64x32"))[2]
    large = send(port, EDITS, *wish, ("size", "256x128"), ("upscale", "true"))[2]
    assert (small["size"], large["size"]) == ("64x32", "256x128")
    expected = opened(small["data"][0]["b64_json"]).resize((256, 128), Image.Resampling.LANCZOS)
    assert np.array_equal(opened(large["data"][0]["b64_json"]), expected)
    status, _, answer = send(port, EDITS, *wish, ("upscale", "true"))
    assert status == 400 and answer["error"]["param"] == "upscale"


def test_a_mask_keeps_what_is_not_transparent(port):
    parts = ("image", picture()), ("mask", hole()), ("prompt", "a cat"), ("seed", 1)
    status, _, answer = send(port, EDITS, *parts)
    assert status == 200, answer
    before = np.array(Image.open(io.BytesIO(picture())))
    after = np.array(opened(answer["data"][0]["b64_json"]))
    assert np.array_equal(before[:, 32:], after[:, 32:])
    assert not np.array_equal(before[:, :32], after[:, :32])


def test_a_variation_has_the_prompt_of_its_picture_or_none(port, tmp_path):
    drawn = saved(ask(port, prompt="a red apple", steps=2, seed=1)[2]["data"][0], tmp_path / "a")
    for data, prompt in ((drawn.read_bytes(), "a red apple"), (picture(), "")):
        status, _, answer = send(port, VARIATIONS, ("image", data), ("seed", 2))
        assert status == 200, answer
        assert "notices" not in answer
        found = read_metadata(saved(answer["data"][0], tmp_path / "b"))
        assert (found["prompt"], found["strength"]) == (prompt, 0.6)
    answer = send(port, VARIATIONS, ("image", drawn.read_bytes()), ("prompt", "a cat"))[2]
    assert read_metadata(saved(answer["data"][0], tmp_path / "b"))["prompt"] == "a cat"


def test_streams_have_names_of_their_own(port):
    for path, name in ((EDITS, "image_edit"), (VARIATIONS, "image_variation")):
        parts = ("image", picture()), ("prompt", "a cat"), ("steps", 4), ("strength", 1)
        wish = ("output_format", "webp"), ("stream", "true"), ("partial_images", 1)
        _, headers, data = send(port, path, *parts, *wish)
        assert headers["Content-Type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]
        assert [e["type"] for e in events] == [f"{name}.partial_image", f"{name}.completed"]
        assert {opened(e["b64_json"]).format for e in events} == {"WEBP"}
        assert data.count(f"event: {name}.".encode()) == 2


# --- what is refused ----------------------------------------------------------------------------

PROMPT, IMAGE = ("prompt", "a cat"), ("image", picture())
BLACK = io.BytesIO()
Image.new("L", (64, 32)).save(BLACK, "png")


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([PROMPT], "image", "there is no picture: send it as image"),
        ([IMAGE], "prompt", "the prompt is empty"),
        ([PROMPT, ("image", "text")], "image", "must be a file"),
        ([PROMPT, IMAGE, IMAGE], "image", "random takes one picture at a time"),
        ([PROMPT, *[IMAGE] * 11], "image", "more than 10 pictures"),
        ([PROMPT, IMAGE, ("mask", hole()), ("mask", hole())], "mask", "more than one mask"),
        ([PROMPT, IMAGE, ("mask", hole(32))], "mask", "the mask has 32x32 pixels"),
        ([PROMPT, IMAGE, ("mask", BLACK.getvalue())], "mask", "the mask selects nothing"),
        ([PROMPT, IMAGE, ("mask", b"no picture")], "mask", "my picture.png: not a picture"),
        ([PROMPT, IMAGE, ("mask", hole()), ("strength", "2")], "strength", "strength must"),
        ([PROMPT, ("image", b"no picture")], "image", "my picture.png: not a picture"),
        ([PROMPT, ("image", picture()[:40])], "image", "my picture.png: "),
        ([PROMPT, ("image", b"")], "image", "my picture.png: "),
        ([PROMPT, PROMPT, IMAGE], "prompt", "more than one prompt"),
        ([PROMPT, IMAGE, ("strength", "0")], "strength", "strength must be above 0"),
        ([PROMPT, IMAGE, ("strength", "much")], "strength", "must be a number"),
        ([PROMPT, IMAGE, ("strength", "1e999")], "strength", "must be a"),
        ([PROMPT, IMAGE, ("n", "11")], "n", "from 1 to 10"),
        ([PROMPT, IMAGE, ("n", "true")], "n", "a whole number"),
        ([PROMPT, IMAGE, ("stream", "1")], "stream", "true or false"),
        ([PROMPT, IMAGE, ("size", "330x320")], "size", "more than the 8192 pixels"),
        ([PROMPT, IMAGE, ("fit", "big")], "fit", "known: crop, pad, stretch"),
        ([PROMPT, IMAGE, ("model", "gpt")], "model", "known: random"),
        ([PROMPT, IMAGE, ("background", "transparent")], "background", "opaque pictures only"),
        ([PROMPT, IMAGE, ("guidence", "2")], "guidence", "did you mean 'guidance'"),
        ([PROMPT, IMAGE, ("picture", picture())], "picture", "the pictures are image and mask"),
        ([PROMPT, IMAGE, ("x" * 300, "")] + [("y", "")] * 50, None, "damaged or too large"),
        ([("prompt", "a" * 20_000), IMAGE], None, "damaged or too large"),
        ([PROMPT, *[IMAGE] * 18], "image", "too many pictures: a form has at most"),
    ],
)
def test_forms_that_make_no_sense(port, parts, param, words):
    status, _, answer = send(port, EDITS, *parts)
    error = answer["error"]
    assert status == (404 if param == "model" else 400), answer
    assert words in error["message"] and "/" not in error["message"].replace("1/", "")
    assert (error["param"], len(error["message"]) <= 300) == (param, True)


def test_a_variation_has_one_picture_and_no_mask(port):
    for more in (IMAGE, ("mask", hole())):
        status, _, answer = send(port, VARIATIONS, IMAGE, more)
        assert (status, "one picture and no mask" in answer["error"]["message"]) == (400, True)


def test_a_damaged_picture_is_one_line(port):
    """Its header is fine, so that the process that draws finds it."""
    data = picture(kind="jpeg")
    status, _, answer = send(port, EDITS, PROMPT, ("image", data[: len(data) // 2]))
    message = answer["error"]["message"]
    assert (status, message.startswith("my picture.png: cannot be read")) == (400, True)
    assert answer["error"]["param"] == "image"
    cut = ("mask", data[: len(data) // 2])
    status, _, answer = send(port, EDITS, PROMPT, ("image", data), cut)
    assert (status, answer["error"]["param"]) == (400, "mask"), answer
    assert ask(port, "GET", "/health")[2]["worker_restarts"] == 0


def test_other_bodies(port):
    def answer(data, kind):
        return ask(port, path=EDITS, headers={"Content-Type": kind}, data=data)[::2]

    status, body = answer(b"{}", "application/json")
    assert (status, "multipart/form-data" in body["error"]["message"]) == (415, True)
    for data, kind in (
        (encoded(PROMPT, IMAGE), "multipart/form-data"),
        (encoded(PROMPT, IMAGE), f"{KIND}x"),
        (encoded(PROMPT, IMAGE)[:-500], KIND),
        (b"", KIND),
        (b"--0123456789\r\n" + b"x" * 10_000, KIND),
        (b"--0123456789\r\n" + b"a: b\r\n" * 1000, KIND),
        (b"--0123456789\r\nContent-Disposition: form-data\r\n\r\n\r\n--0123456789--", KIND),
        (encoded(("n\xe4me", "\ud800".encode("utf-8", "surrogatepass"))), KIND),
        (encoded((b"\xff", "a"), IMAGE), f"{KIND}; charset=idna"),
        (encoded(PROMPT, IMAGE), f"multipart/form-data; boundary={'x' * 3000}"),
    ):
        status, body = answer(data, kind)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error"), (kind, body)
    assert ask(port, "GET", EDITS)[0] == 405


def test_clients_that_leave_leave_nothing(port):
    parts = PROMPT, IMAGE, ("mask", hole()), ("steps", 100), ("n", 10)
    body = encoded(*parts)
    head = f"POST {EDITS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {KIND}\r\n"
    head = f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
    for sent in (body, body[:-20], body[:200]):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head + sent)
            if sent == body:
                while not ask(port, "GET", "/health")[2]["open_requests"]:
                    time.sleep(0.01)
    end = time.monotonic() + 30
    while ask(port, "GET", "/health")[2]["open_requests"]:
        assert time.monotonic() < end, "a request that nobody waits for stayed open"
        time.sleep(0.05)


def read(body, kind=KIND, chunk=1 << 16, reader=None):
    """(`Uploads.read` of a body, the files then)."""
    reader = reader or uploads.Uploads()

    async def run():
        chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
        messages = iter(
            {"type": "http.request", "body": part, "more_body": i + 1 < len(chunks)}
            for i, part in enumerate(chunks)
        )

        async def receive():
            return next(messages)

        scope = {"type": "http", "headers": [(b"content-type", kind.encode("latin-1"))]}
        with contextlib.ExitStack() as files:
            form = await reader.read(Request(scope, receive), files)
            kept = [path.read_bytes() for path in form.images]
            folders = {path.parents[1] for path in form.images}
            assert all(path.stat().st_mode & 0o077 == 0 for path in folders)
        assert not any(path.exists() for path in folders)
        return form, kept

    return asyncio.run(run())


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_pictures_arrive_byte_for_byte(chunk):
    data = b"\r\n--012345678\r\n--" * 20 + bytes(range(256)) + b"\r\n"
    form, kept = read(encoded(PROMPT, ("image", data), ("image[]", b"x")), chunk=chunk)
    assert kept == [data, b"x"]
    assert (form.values, form.mask) == ({"prompt": "a cat"}, None)
    assert [path.name for path in form.images] == ["my picture.png"] * 2


def test_pictures_of_a_server_that_was_killed_are_deleted(port, folder):
    (folder / ".snapgen-dead" / "image-0").mkdir(parents=True)
    assert send(port, EDITS, IMAGE, PROMPT, ("steps", 1))[0] == 200
    assert not (folder / ".snapgen-dead").exists()


def test_large_forms_are_refused(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_FORM", 1 << 20)
    with pytest.raises(RequestError, match="the form is larger than") as error:
        read(encoded(PROMPT, ("image", bytes(2 << 20))))
    assert error.value.status == 413
    monkeypatch.setattr(uploads, "MAX_STORED", 1 << 19)
    with pytest.raises(RequestError, match="too many pictures at once") as error:
        read(encoded(PROMPT, ("image", bytes(3 << 18))))
    assert error.value.status == 429
    # One after the other there is room.
    reader = uploads.Uploads()
    for _ in range(3):
        read(encoded(PROMPT, ("image", bytes(1 << 18))), reader=reader)


# --- the real client, and a public model --------------------------------------------------------


def test_the_openai_client(port):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    extra = {"seed": 7, "steps": 4, "strength": 1}
    wish = {"model": "random", "prompt": "a cat", "extra_body": extra}
    image, mask = ("a.png", picture()), ("m.png", hole())
    plain = client.images.edit(image=image, **wish)
    assert opened(plain.data[0].b64_json).size == (64, 32)
    listed = client.images.edit(image=[image], n=2, size="64x32", response_format="url", **wish)
    assert len(listed.data) == 2 and listed.data[0].url.endswith(".png")
    masked = client.images.edit(image=image, mask=mask, output_format="jpeg", **wish)
    assert opened(masked.data[0].b64_json).format == "JPEG"
    events = list(client.images.edit(image=image, stream=True, partial_images=2, **wish))
    kinds = ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [e.type for e in events] == kinds
    assert events[-1].b64_json == plain.data[0].b64_json
    with pytest.warns(DeprecationWarning):
        varied = client.images.create_variation(image=image, n=2, extra_body={"steps": 2})
        assert [opened(d.b64_json).size for d in varied.data] == [(64, 32)] * 2
        extra = {"stream": True, "partial_images": 1, "steps": 4, "strength": 1}
        with client.images.with_streaming_response.create_variation(
            image=image, extra_body=extra
        ) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("event: ")]
    names = ["event: image_variation.partial_image", "event: image_variation.completed"]
    assert lines == names
    with pytest.raises(openai.BadRequestError, match="not a picture"):
        client.images.edit(image=("a.png", b"x"), prompt="a cat")
    with pytest.raises(openai.NotFoundError, match="known: random"):
        client.images.edit(image=image, prompt="a cat", model="dall-e-2")


def test_a_public_model_edits_several_pictures(model_folder, tmp_path, monkeypatch):
    """FLUX.2 klein beside another model, loaded when it is asked for."""
    require("mlx_lm", "torch", "diffusers", "transformers")
    from convert.parity.originals import flux2_klein_pipeline

    flux2_klein_pipeline(is_distilled=True).save_pretrained(tmp_path / "klein")
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process, port = start(
        "--model", model_folder, tmp_path / "klein", "--quantize", "none", "--memory", "0.001",
        "--alias", "gpt-image-1=FLUX.2 klein",
    )  # fmt: skip
    try:
        names = ["random", "FLUX.2 klein", "gpt-image-1"]
        models = ask(port, "GET", "/v1/models")[2]["data"]
        assert [model["id"] for model in models] == names
        assert models[1] == ask(port, "GET", "/v1/models/FLUX.2%20klein")[2]
        assert (models[2]["root"], models[2]["size"]) == ("FLUX.2 klein", "1024x1024")
        assert (models[0]["any_size"], models[2]["any_size"]) == (False, True)
        [mode] = models[2]["modes"]
        assert (mode["few_step"], mode["steps"], mode["guidance"]) == (True, 4, 1.0)
        can = mode["abilities"]
        assert (can["reference_images"], can["negative_prompt"]) == (True, False)
        assert can["batches"] is False
        two = ("image[]", picture(64, 64)), ("image[]", picture(96, 64))
        wish = ("model", "gpt-image-1"), PROMPT, ("size", "64x64"), ("steps", 2), ("seed", 1)
        status, _, answer = send(port, EDITS, *two, *wish)
        assert status == 200, answer
        found = read_metadata(saved(answer["data"][0], tmp_path / "a.png"))
        assert [edit["name"] for edit in found["edit"]] == ["my picture.png"] * 2
        assert "image" not in found
        status, _, answer = send(port, EDITS, *two, *wish, ("fit", "pad"))
        assert (status, answer["error"]["param"]) == (400, "fit")
        for path, more in ((EDITS, [("mask", hole(64, 64))]), (VARIATIONS, [])):
            status, _, answer = send(port, path, ("image", picture(64, 64)), *wish, *more)
            assert status == 200, answer
            found = read_metadata(saved(answer["data"][0], tmp_path / "a.png"))
            assert found["image"] and "edit" not in found
        assert ask(port, prompt="a cat", steps=1)[0] == 200
        wish = {"prompt": "a cat", "model": "FLUX.2 klein", "steps": 2, "seed": 3}
        one = ask(port, size="70x73", **wish)[2]
        assert (one["size"], one["notices"][0].partition(",")[0]) == ("64x80", "drawn at 64x80")
        _, _, data = ask(port, size="64x80", n=2, stream=True, partial_images=1, **wish)
        events = [json.loads(line[6:]) for line in data.splitlines() if line[:6] == b"data: "]
        # One by one: no turns.
        assert [(e["image"], e["seed"]) for e in events] == [(0, 3), (0, 3), (1, 4), (1, 4)]
        assert events[1]["b64_json"] == one["data"][0]["b64_json"]
        answer = ask(port, size="64x64", **wish | {"prompt": "car " * 800 + "moon"})[2]
        [notice] = answer["notices"]
        assert notice.startswith("the prompt is longer than 512 tokens") and "moon'" in notice
        wish = {"prompt": "a cat", "model": "FLUX.2 klein", "negative_prompt": "a dog"}
        status, _, answer = ask(port, size="64x64", **wish)
        assert (status, "no negative prompt" in answer["error"]["message"]) == (400, True)
        stop(process)
    finally:
        process.kill()
    assert not list(Path(tmp_path).glob(".snapgen-*"))
