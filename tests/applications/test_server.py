"""The server as a process, spoken to over sockets: OpenAI's protocol, load, and rude clients."""

import asyncio
import base64
import concurrent.futures
import configparser
import contextlib
import dataclasses
import http.client
import io
import itertools
import json
import logging
import math
import os
import plistlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import KEY, read_metadata
from mlx_snapgen.pipeline import SnapGenPipeline
from tests.applications.serving import (
    GENERATIONS,
    NO_SERVER,
    PATIENCE,
    ROOT,
    ask,
    opened,
    start,
    stop,
)
from tests.tiny import memory

pytest.importorskip("starlette", reason=NO_SERVER)
pytest.importorskip("uvicorn", reason=NO_SERVER)
pytest.importorskip("python_multipart", reason=NO_SERVER)

from starlette.datastructures import Headers

from apps.server import connection
from apps.server.__main__ import build_parser, choices, open_models
from apps.server.app import Server, create_app
from apps.server.errors import RequestError
from apps.server.jobs import Busy, Drawing, Jobs, PictureStore
from apps.server.models import Served, name_models
from apps.server.request import Limits, parse_request
from apps.worker.engine import encode_picture
from apps.worker.messages import Failed, Finished, Job, Opened, Progress
from mlx_snapgen.cli.options import model_choice
from mlx_snapgen.settings import ModelChoice
from mlx_snapgen.teachers.config import TeacherConfig


@pytest.fixture(scope="module")
def server(model_folder):
    process, port = start("--model", model_folder, "--model-widths", "full", "tiny", "--queue", 3)
    yield process, port
    stop(process)


@pytest.fixture
def port(server):
    return server[1]


def patiently(port, **body):
    """`ask`, again whenever the queue is full; (answer, how often it was)."""
    refused = 0
    while (answer := ask(port, **body))[0] == 429:
        assert int(answer[1]["Retry-After"]) >= 1
        assert answer[2]["error"]["code"] == "queue_full"
        refused += 1
        time.sleep(0.2)
    return answer, refused


def idle(port):
    """Whether nothing is open, within a few seconds."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if ask(port, "GET", "/health")[2]["open_requests"] == 0:
            return True
        time.sleep(0.05)
    return False


def parse(values, config, **limits):
    """`parse_request` by a server with one model."""
    model = Served("random", ModelChoice(), config)
    return parse_request(values, {"random": model}, Limits(**limits))


# --- protocol -----------------------------------------------------------------------------------


def test_pictures_are_those_of_the_pipeline(port, model_folder, tmp_path):
    wish = {"n": 2, "size": "32x64", "seed": 5, "steps": 2, "guidance": 2, "negative_prompt": "car"}
    status, _, answer = ask(port, prompt="a red apple", **wish)
    assert status == 200
    assert (answer["size"], answer["output_format"]) == ("32x64", "png")
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    expected = pipe("a red apple", negative_prompt="car", height=64, width=32, seed=5,
                    num_inference_steps=2, guidance_scale=2, num_images=2)  # fmt: skip
    for data, image in zip(answer["data"], expected, strict=True):
        assert np.array_equal(np.array(opened(data["b64_json"])), np.array(image))
    (tmp_path / "x.png").write_bytes(base64.b64decode(answer["data"][1]["b64_json"]))
    assert read_metadata(tmp_path / "x.png")["seed"] == answer["data"][1]["seed"] == 6


def test_models_and_health(port, model_folder):
    assert [m["id"] for m in ask(port, "GET", "/v1/models")[2]["data"]] == ["random", "random-tiny"]
    assert ask(port, "GET", "/v1/models/random-tiny")[2]["owned_by"] == "mlx_snapgen"
    assert ask(port, "GET", f"/v1/models/{model_folder}")[2]["id"] == "random"
    assert ask(port, "GET", "/v1/models/gpt")[2]["error"]["code"] == "model_not_found"
    status, _, health = ask(port, "GET", "/health")
    assert (status, health["status"], health["model"]) == (200, "ok", "random")
    full = ask(port, prompt="a cat", seed=1, steps=1)[2]["data"][0]
    tiny = ask(port, prompt="a cat", seed=1, steps=1, model="random-tiny")[2]["data"][0]
    assert full["b64_json"] != tiny["b64_json"]


def test_pictures_by_url(port):
    wish = {"seed": 2, "steps": 1, "response_format": "url"}
    url = ask(port, prompt="a cat", **wish)[2]["data"][0]["url"]
    path = url.removeprefix(f"http://127.0.0.1:{port}")
    status, headers, png = ask(port, "GET", path)
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(png)).size == (64, 32)
    assert ask(port, "GET", "/images/unknown.png")[0] == 404


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(port, kind):
    wish = {"prompt": "a cat", "seed": 2, "steps": 2, "output_format": kind}
    small, large = (
        ask(port, output_compression=quality, **wish)[2]["data"][0] for quality in (5, 100)
    )
    assert len(small["b64_json"]) < len(large["b64_json"])
    answer = ask(port, response_format="url", background="opaque", **wish)[2]
    assert (answer["output_format"], answer["background"]) == (kind, "opaque")
    url = answer["data"][0]["url"]
    assert url.endswith(f".{kind}")
    _, headers, data = ask(port, "GET", url.removeprefix(f"http://127.0.0.1:{port}"))
    assert headers["Content-Type"] == f"image/{kind}"
    assert data == base64.b64decode(large["b64_json"])
    _, _, data = ask(port, stream=True, **wish)
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]
    assert [e["output_format"] for e in events] == [kind, kind]
    assert {opened(e["b64_json"]).format for e in events} == {kind.upper()}


def test_a_stream_shows_every_step_and_ends_with_the_picture(port):
    wish = {"prompt": "a cat", "seed": 4, "steps": 4}
    _, headers, data = ask(port, stream=True, **wish)
    assert headers["Content-Type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in block.splitlines())
              for block in data.decode().strip().split("\n\n")]  # fmt: skip
    names = ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [e["event"] for e in events] == names
    bodies = [json.loads(e["data"]) for e in events]
    assert [b["type"] for b in bodies] == names
    assert [b.get("partial_image_index") for b in bodies] == [0, 1, 2, None]
    assert len({b["b64_json"] for b in bodies}) == 4
    assert bodies[3]["b64_json"] == ask(port, **wish)[2]["data"][0]["b64_json"]
    _, _, data = ask(port, stream=True, partial_images=1, **wish)
    assert data.count(b"event: ") == 2


def test_the_steps_of_each_picture_of_a_batch_are_counted_in_a_stream(port):
    wish = {"prompt": "a cat", "seed": 4, "steps": 3, "n": 2}
    _, _, data = ask(port, stream=True, **wish)
    events = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]
    # The pictures take turns; None is the finished one.
    assert [(e["image"], e["seed"], e.get("partial_image_index")) for e in events] == [
        (k, 4 + k, i) for i in (0, 1, None) for k in range(2)
    ]
    answer = ask(port, **wish)[2]["data"]
    assert [e["b64_json"] for e in events[4:]] == [picture["b64_json"] for picture in answer]


def test_notices_come_along(port):
    answer = ask(port, prompt="a zebra", steps=1)[2]
    assert any("nothing that this model can draw" in notice for notice in answer["notices"])


def test_the_old_name_of_the_widths_still_works(capsys):
    args = build_parser().parse_args(
        ["--model-width", "full", "tiny", "--lora", "a.safetensors", "--cache-limit", "0.5"]
    )
    assert args.cache_limit == 500_000_000
    assert args.model_widths == ["full", "tiny"]
    assert model_choice(args) == ModelChoice(loras=(("a.safetensors", 1.0),))
    assert capsys.readouterr().err == "warning: --model-width is now --model-widths\n"


@pytest.mark.parametrize(("widths", "opened"), [(["small", "full"], "full"), (["tiny"], "tiny")])
def test_a_model_is_opened_at_one_of_the_widths(widths, opened):
    """A public one of another width is then refused before it is fetched."""
    asked = []

    class Worker:
        def submit(self, job):
            asked.append(job.choice.model_width)
            return self

        async def get(self):
            return Failed(0, "no such model")

    args = build_parser().parse_args(["--model-widths", *widths])
    with pytest.raises(UserError, match="no such model"):
        asyncio.run(open_models(Worker(), args))
    assert asked == [opened]


def test_names_are_checked_before_a_model_is_fetched(components):
    asked = []

    class Worker:
        def submit(self, job):
            asked.append((job.choice.model, job.fetch))
            return self

        async def get(self):
            config = components.config if asked[-1][0] == "a/b" else TeacherConfig()
            return Opened(0, ModelChoice(asked[-1][0]), config)

    def opened(*options):
        asked.clear()
        args = build_parser().parse_args(["--model", "a/b", "c/d", *options])
        return asyncio.run(open_models(Worker(), args))

    models = opened("--alias", "x=c/d", "--alias", "y=random")
    assert {name: model.choice.model for name, model in models.items()} == {
        **{"random": "a/b", "Qwen-Image": "c/d"},
        **{"x": "c/d", "y": "a/b"},
    }
    assert asked == [("a/b", False), ("c/d", False), ("a/b", True), ("c/d", True)]
    for wrong in (["--alias", "x=z"], ["--alias", "x=a/b", "--alias", "x=c/d"]):
        with pytest.raises(UserError, match="--alias x="):
            opened(*wrong)
        assert asked == [("a/b", False), ("c/d", False)]
    with pytest.raises(UserError, match="width"):
        opened("--model-widths", "huge")


def test_a_request_may_name_a_model_as_the_user_did(components):
    ours, other = components.config, TeacherConfig()
    chosen = [(ModelChoice(name), config) for name, config in (("a/b", ours), ("c/d", other))]
    models = name_models(chosen, widths=["full", "tiny"], aliases=[])
    values = {"prompt": "a cat"}
    for name, model, width in [
        *[("a/b", "a/b", "full"), ("c/d", "c/d", "full"), ("random-tiny", "a/b", "tiny")],
    ]:
        job = parse_request(values | {"model": name}, models, Limits()).job
        assert (job.choice.model, job.choice.model_width) == (model, width)
    with pytest.raises(RequestError, match=r"no model 'a', known: random, .*-tiny, Qwen-Image$"):
        parse_request(values | {"model": "a"}, models, Limits())
    models = name_models([(ModelChoice(), ours)], widths=["full"], aliases=[("x", "fluent")])
    assert list(models) == ["random", "x"]
    assert parse_request(values | {"model": "fluent"}, models, Limits()).job.choice.model is None


def test_files_have_a_base_each_or_one_for_all():
    def bases(*options):
        return [c.base for c in choices(build_parser().parse_args(options))]

    files = "--model", "a.safetensors", "stickers", "b.safetensors"
    assert bases() == [None]
    assert bases(*files) == [None] * 3
    assert bases(*files, "--base", "x") == ["x", None, "x"]
    assert bases(*files, "--base", "x", "y") == ["x", None, "y"]
    assert bases(*files[:2], "--base", "x", "--model", *files[2:], "--base", "y") == [
        *("x", None, "y")
    ]


def named(configs, widths=("full",), aliases=(), **choice):
    """`name_models` of configs whose models are a, b, ..."""
    opened = [
        (ModelChoice(name, **choice), config) for name, config in zip("abc", configs, strict=False)
    ]
    found = name_models(opened, widths=widths, aliases=aliases)
    return {name: (model.choice.model, model.choice.model_width) for name, model in found.items()}


def test_names_of_models(components):
    ours, other = components.config, TeacherConfig()
    assert named([ours, other], ("full", "tiny"), [("gpt-image-1", "random-tiny")]) == {
        "random": ("a", "full"),
        "random-tiny": ("a", "tiny"),
        "Qwen-Image": ("b", "full"),
        "gpt-image-1": ("a", "tiny"),
    }
    assert list(named([ours, ours, other])) == ["a", "b", "Qwen-Image"]
    assert named([ours, other], aliases=[("klein", "b")])["klein"] == ("b", "full")


def test_an_alias_takes_short_names_in_any_case(components):
    def aliased(to, *models):
        opened = [(ModelChoice(name), config) for name, config in models]
        return name_models(opened, widths=["full"], aliases=[("x", to)])["x"].choice.model

    ours = "stickers", components.config
    public = "Tongyi-MAI/Z-Image-Turbo", TeacherConfig()
    for name in ("Z-Image-Turbo", "z-image-turbo", "qwen-image", "tongyi-mai/z-image-turbo"):
        assert aliased(name, ours, public) == public[0]
    assert aliased("Klein", ours, ("/models/klein/", TeacherConfig())) == "/models/klein/"
    assert aliased("STICKERS", ours, public) == "stickers"
    with pytest.raises(UserError, match="--alias x=klein: no such model"):
        aliased("klein", ("a/klein", TeacherConfig()), ("b/klein", TeacherConfig()))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"widths": ["tiny"]}, "no width 'tiny', only full"),
        ({"aliases": [("x", "y")]}, "--alias x=y: no such model, known: Qwen-Image"),
        ({"aliases": [("Qwen-Image", "Qwen-Image")]}, "the name Qwen-Image is taken"),
    ],
)
def test_names_that_make_no_sense(wrong, words):
    with pytest.raises(UserError, match=words):
        named([TeacherConfig()], **wrong)
    with pytest.raises(UserError, match="two models have the name a: give each --model once"):
        choice = ModelChoice("a"), TeacherConfig()
        name_models([choice, choice], widths=["full"], aliases=[])


def test_what_a_model_can_is_listed(port):
    [full, tiny] = ask(port, "GET", "/v1/models")[2]["data"]
    assert (full["id"], tiny["id"], tiny["root"]) == ("random", "random-tiny", "random-tiny")
    assert (full["size"], full["size_multiple_of"], full["max_pixels"]) == ("64x32", 32, 8192)
    assert full["output_formats"] == ["png", "jpeg", "webp"]
    [mode] = full["modes"]
    assert (mode["few_step"], mode["steps"], mode["guidance"]) == (False, 2, 3.0)
    assert mode["abilities"]["negative_prompt"] is mode["abilities"]["batches"] is True


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": 7}, "prompt", "a string"),
        ({"prompt": "a" * 4001}, "prompt", "4000"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"n": True}, "n", "a whole number"),
        ({"size": "big"}, "size", "like 64x32"),
        ({"size": "96000x32"}, "size", "more than the 8192 pixels"),
        ({"size": "4096x2048", "upscale": True}, "size", "more than the 4194304 pixels that upsc"),
        ({"size": "0x32", "upscale": True}, "size", "like 64x32"),
        ({"upscale": True}, "upscale", "needs the size to enlarge to, such as 1024x1024"),
        ({"size": "auto", "upscale": True}, "upscale", "needs the size"),
        ({"size": "64x32", "upscale": 2}, "upscale", "true or false"),
        ({"steps": 101}, "steps", "from 1 to 100"),
        ({"guidance": 1e999}, "guidance", "finite"),
        ({"guidance": -1}, "guidance", "at least 0"),
        ({"guidance": 10**400}, "guidance", "finite"),
        ({"n": 1.5}, "n", "a whole number, such as 1"),
        ({"size": "256x256"}, "size", r"use auto \(64x32\), or .* --max-pixels 65536"),
        ({"seed": -1}, "seed", "from 0 to .*; without it, it is random"),
        ({"model": "x" * 60_000}, "model", "known: random"),
        ({"x" * 60_000: 1}, "x" * 50, "unknown parameter"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "from 0"),
        ({"few_step": True}, "few_step", "no few-step mode"),
        ({"output_format": "gif"}, "output_format", "known: png, jpeg, webp"),
        ({"output_compression": 50}, "output_compression", "a PNG loses nothing"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "to 100"),
        ({"background": "transparent"}, "background", "draws opaque pictures only"),
        ({"response_format": "jpg"}, "response_format", "b64_json"),
        ({"stream": True, "response_format": "url"}, "response_format", "stream"),
        ({"guidence": 2}, "guidence", "did you mean 'guidance'"),
        ({"size": "1000000000000x64"}, "size", "more than 999999 pixels"),
        ({"quality": 3}, "quality", "quality must be a string"),
        ({"strength": 0.5}, "strength", "strength belongs to edits"),
        ([], None, "JSON object"),
    ],
)
def test_requests_that_make_no_sense(components, wrong, param, words):
    values = {"prompt": "a cat"} | wrong if isinstance(wrong, dict) else wrong
    with pytest.raises(RequestError, match=words) as error:
        parse(values, components.config)
    assert error.value.status == (404 if param == "model" else 400)
    assert error.value.body()["error"]["param"] == param
    assert len(str(error.value)) <= 300


def test_no_limit_of_the_server_is_more_than_the_machine(components):
    values = {"prompt": "a cat", "size": "16384x16384"}
    with pytest.raises(RequestError, match="choose a smaller size") as error:
        parse(values, components.config, max_pixels=2**40)
    assert error.value.status == 400


def test_only_a_model_with_alpha_is_transparent(components):
    autoencoder = dataclasses.replace(components.config.autoencoder, picture_channels=4)
    config = dataclasses.replace(components.config, autoencoder=autoencoder)
    forms = {
        (background, kind): parse(
            {"prompt": "a cat", "background": background, "output_format": kind}, config
        ).job.file_format
        for background, kind in (("auto", "png"), ("transparent", "webp"), ("opaque", "png"))
    }
    assert [form.opaque for form in forms.values()] == [False, False, True]
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    modes = [Image.open(io.BytesIO(encode_picture(picture, form))).mode for form in forms.values()]
    assert modes == ["RGBA", "RGBA", "RGB"]
    white = Image.open(io.BytesIO(encode_picture(picture, forms["opaque", "png"])))
    assert white.getpixel((0, 0)) == (255, 255, 255)
    wrong = {"prompt": "a cat", "background": "transparent", "output_format": "jpeg"}
    with pytest.raises(RequestError, match="a JPEG cannot be transparent"):
        parse(wrong, config)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ("1024x1024", (64, 64)),
        ("1024x1536", (64, 96)),
        ("1536x1024", (64, 32)),
        ("33x32", (64, 64)),
        ("auto", (64, 32)),
    ],
)
def test_the_size_is_the_nearest_of_the_training(components, size, drawn):
    config = dataclasses.replace(components.config, trained_sizes=((64, 64), (96, 64)))
    models = {"random": Served("random", ModelChoice(), config)}
    wish = parse_request({"prompt": "a cat", "size": size}, models, Limits())
    assert drawn == (wish.job.settings.width, wish.job.settings.height)
    name = "drawn at {}x{}, the nearest size that random was trained on".format(*drawn)
    assert [text.partition(";")[0] for text in wish.notices] == ([] if size == "auto" else [name])


@pytest.mark.parametrize(
    ("asked", "drawn", "enlarged", "notice"),
    [
        ("1024x1024", (64, 64), (1024, 1024), None),
        ("1536x1024", (96, 64), (1536, 1024), None),
        ("1792x1024", (96, 64), (1536, 1024), "and enlarged to 1536x1024 in its own shape"),
        ("96x64", (96, 64), None, None),
        ("48x48", (64, 64), None, "drawn at 64x64, the nearest size that random was trained on"),
    ],
)
def test_a_picture_is_enlarged_to_the_size(components, asked, drawn, enlarged, notice):
    config = dataclasses.replace(
        components.config, image_size=(64, 64), trained_sizes=((64, 64), (64, 96))
    )
    wish = parse({"prompt": "a cat", "size": asked, "upscale": True}, config)
    assert (wish.job.settings.width, wish.job.settings.height) == drawn
    assert wish.job.enlarged == enlarged
    assert [notice in text for text in wish.notices] == ([] if notice is None else [True])
    assert parse({"prompt": "a cat", "size": asked}, config).job.enlarged is None


@pytest.mark.parametrize(
    ("asked", "drawn"), [("33x32", (32, 32)), ("49x50", (64, 64)), ("5x70", (32, 64))]
)
def test_a_size_that_is_no_multiple_is_rounded(components, asked, drawn):
    wish = parse({"prompt": "a cat", "size": asked}, components.config)
    assert (wish.job.settings.width, wish.job.settings.height) == drawn
    name = "drawn at {}x{}, the nearest size in multiples of 32 pixels".format(*drawn)
    assert [text.partition(";")[0] for text in wish.notices] == [name]
    assert not parse({"prompt": "a cat", "size": "64x64"}, components.config).notices


def test_partial_images_are_for_streams(components):
    """As OpenAI documents them; they must be a number all the same."""
    wish = {"prompt": "a cat", "partial_images": 2}
    found = parse(wish, components.config)
    assert (found.job.previews, found.stream) == (0, False)
    assert found.notices == ("partial_images has no effect without stream",)
    streamed = parse(wish | {"stream": True}, components.config)
    assert (streamed.job.previews, streamed.notices) == (2, ())
    assert not parse(wish | {"partial_images": 0}, components.config).notices
    with pytest.raises(RequestError, match="partial_images must be a whole number"):
        parse(wish | {"partial_images": "two"}, components.config)


def test_what_is_too_large_to_draw_is_enlarged_if_asked(components):
    wish = {"prompt": "a cat", "size": "1024x512"}
    with pytest.raises(RequestError, match="more than the 8192 pixels"):
        parse(wish, components.config)
    found = parse(wish | {"upscale": True}, components.config)
    assert (found.job.settings.width, found.job.settings.height) == (64, 32)
    assert (found.job.enlarged, found.notices) == ((1024, 512), ())


def test_enlarging_is_not_advised_where_it_is_refused(components):
    for asked, advised in (("2048x2048", True), ("4096x4096", False)):
        config = dataclasses.replace(
            components.config, image_size=(64, 64), trained_sizes=((64, 64),)
        )
        wish = {"prompt": "a cat", "size": asked}
        [notice] = parse(wish, config).notices
        assert ("; upscale enlarges it" in notice) == advised
        if not advised:
            with pytest.raises(RequestError, match="pixels that upscale can have"):
                parse(wish | {"upscale": True}, config)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_gone_is_no_fault_of_the_client(components, caplog, monkeypatch, stream):
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    drawing = Drawing(1)
    told = "delete /srv/cache/turbo and run the command again: it is damaged"
    drawing.put(Failed(1, told, internal=True))
    jobs = SimpleNamespace(submit=lambda job: drawing, cancel=lambda drawing: None)
    served = {"random": Served("random", ModelChoice(), components.config)}
    app = create_app(Server(jobs, served, limits=Limits()), None)
    sent = []

    async def receive():
        if sent_body:
            await asyncio.sleep(60)
        sent_body.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    sent_body, body = [], json.dumps({"prompt": "a cat", "stream": stream}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": headers}
    scope |= {"query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 500
    error = json.loads(sent[1]["body"])["error"]
    assert error["type"] == "server_error" and "/srv" not in error["message"]
    assert told in caplog.text


def test_an_enlarged_picture_records_it(port):
    wish = {"prompt": "a red apple", "seed": 5, "steps": 2}
    small = opened(ask(port, **wish)[2]["data"][0]["b64_json"])
    answer = ask(port, size="256x128", upscale=True, **wish)[2]
    large = opened(answer["data"][0]["b64_json"])
    expected = small.resize((256, 128), Image.Resampling.LANCZOS)
    assert answer["size"] == "256x128" and np.array_equal(large, expected)
    values = json.loads(large.info[KEY])
    assert (values["width"], values["height"]) == (64, 32)
    assert values["upscaled"] == {"width": 256, "height": 128, "resampling": "lanczos"}
    assert "upscaled" not in json.loads(small.info[KEY])


def test_the_limit_of_pixels_is_one_of_their_number(components):
    height, width = components.config.image_size
    wish = {"prompt": "a red apple", "size": f"{4 * width}x{height}"}
    settings = parse(wish, components.config).job.settings
    assert (settings.width, settings.height) == (4 * width, height)


def test_whole_numbers_may_be_written_with_a_point(components):
    values = {"prompt": "a cat", "n": 2.0, "seed": 7.0}
    settings = parse(values, components.config).job.settings
    assert (settings.num_images, settings.seed) == (2, 7)
    assert type(settings.num_images) is type(settings.seed) is int


def test_parameters_of_other_models_are_ignored(components):
    values = {"prompt": "a cat", "quality": "high", "style": None, "user": "me", "size": "auto"}
    settings = parse(values, components.config).job.settings
    assert (settings.width, settings.height, settings.num_images) == (64, 32, 1)


def test_bodies_that_are_none(port):
    def send(body, kind="application/json"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", GENERATIONS, body, {"Content-Type": kind})
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        assert error["type"] == "invalid_request_error"
        return response.status

    assert send(b"") == 400
    assert send(b"{") == 400
    assert send(b"\xff\xfe") == 400
    assert send(b"[" * 60000) == 400
    assert send(b" " * (70 << 10)) == 413
    assert send(b'{"prompt": "a cat"}', "text/plain") == 415
    assert ask(port, "GET")[0] == 405
    for half in (b'{"prompt": "\\ud800"}', b'{"\\udfff": 1}', b'{"model": "\\ud800"}'):
        assert send(half) == 400
    message = ask(port, "GET", "/images/generations")[2]["error"]["message"]
    assert message == "nothing at /images/generations: the API is under /v1, such as /v1/models"
    assert ask(port, prompt="a cat", steps=1, model="gpt")[0] == 404


@pytest.mark.parametrize(
    ("host", "path"),
    [("localhost", GENERATIONS), ("localhost", "/nowhere"), ("elsewhere.example", GENERATIONS)],
)
def test_a_body_that_breaks_is_no_fault_of_the_server(host, path, capsys, caplog):
    """Before and after the answer, which may need no body."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()
    jobs = SimpleNamespace(stalled=False, served=0, restarts=0)
    server = connection.make_server(create_app(Server(jobs, {}, limits=Limits()), None))
    sock = socket.create_server(("127.0.0.1", 0))

    async def serve():
        async def send(*parts):
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.1)
            found = await reader.read()
            writer.close()
            return found

        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        broken = b"zz\r\nxx\r\n"
        answers = [await send(head + broken), await send(head, broken)]
        answers.append(await send(head, b"2\r\n{}\r\n", broken))
        server.should_exit = True
        await serving
        return answers

    answers = asyncio.run(serve())
    assert all(answer.startswith(b"HTTP/1.1 4") for answer in answers), answers
    assert answers[0].startswith(b"HTTP/1.1 400")
    for answer in answers:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["type"] == "invalid_request_error"
    assert (b" 403 " in answers[1]) is (host != "localhost")
    assert "Traceback" not in capsys.readouterr().err + caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_only_this_machine_without_a_key(port):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil@localhost.evil", "[", "1.2.3.4"):
        status, _, answer = ask(port, "GET", "/v1/models", {"Host": host})
        assert status == 403
        assert "start the server with --api-key" in answer["error"]["message"]
    for host in (f"localhost:{port}", "LOCALHOST", "127.0.0.2:80", f"[::1]:{port}", "127.1.2.3"):
        assert ask(port, "GET", "/v1/models", {"Host": host})[0] == 200
    wish = {"prompt": "a cat", "steps": 1}
    for origin in ("https://evil.example", "null", "http://localhost.evil.example:80", "file://"):
        status, _, answer = ask(port, headers={"Origin": origin}, **wish)
        assert (status, answer["error"]["type"]) == (403, "invalid_request_error")
        assert "--api-key" in answer["error"]["message"]
    for origin in ("http://localhost:3000", f"http://127.0.0.1:{port}", "http://[::1]"):
        assert ask(port, headers={"Origin": origin}, **wish)[0] == 200


PAGE = "https://chat.example"


@pytest.mark.parametrize("key", [None, "secret"])
def test_pages_of_an_allowed_origin(components, key):
    """A browser's preflight needs no key, and its page may read every answer."""
    models = {"random": Served("random", ModelChoice(), components.config)}
    app = create_app(Server(None, models, limits=Limits()), key, origins=[PAGE])

    def send(method, path, **headers):
        sent = []

        async def receive():
            return {"type": "http.request"}

        async def collect(message):
            sent.append(message)

        headers = {"Host": "127.0.0.1:8000"} | headers
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": raw,
        }
        asyncio.run(app(scope, receive, collect))
        return sent[0]["status"], Headers(raw=sent[0]["headers"])

    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    status, headers = send("OPTIONS", GENERATIONS, Origin=PAGE, **asks)
    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == PAGE
    assert headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert headers["Access-Control-Allow-Headers"] == asks["Access-Control-Request-Headers"]
    assert headers["Access-Control-Allow-Private-Network"] == "true"
    assert headers["Vary"] == "Origin"
    right = {"Authorization": f"Bearer {key}"} if key else {}
    for sent, expected in ((right, 200), ({"Authorization": "Bearer no"}, 401 if key else 200)):
        status, headers = send("GET", "/v1/models", Origin=PAGE, **sent)
        assert status == expected
        assert headers["Access-Control-Allow-Origin"] == PAGE
    for origin in ("https://evil.example", "null", f"{PAGE}.evil", "http://chat.example", ""):
        status, headers = send("GET", "/v1/models", Origin=origin, **right)
        assert status == (200 if key else 403)
        assert "Access-Control-Allow-Origin" not in headers
        assert headers["Vary"] == "Origin"
        status, headers = send("OPTIONS", GENERATIONS, Origin=origin, **asks)
        assert status == (401 if key else 403)
        assert "Access-Control-Allow-Headers" not in headers
    # Nor through a host name of its own (DNS rebinding).
    status, _ = send("OPTIONS", GENERATIONS, Origin=PAGE, Host="evil.example", **asks)
    assert status == (204 if key else 403)


def test_origins_are_those_of_browsers():
    parser = build_parser()
    urls = ["https://Chat.Example:443/", "http://a.b:8080", "app://obsidian.md"]
    args = parser.parse_args([word for url in urls for word in ("--allow-origin", url)])
    assert args.origins == [PAGE, "http://a.b:8080", "app://obsidian.md"]
    for wrong in ("*", "chat.example", "https://a/b", "https://*.a", "https://a@b", "https://ä.de"):
        with pytest.raises(UserError, match="takes an origin like https://"):
            parser.parse_args(["--allow-origin", wrong])


def test_the_queue_has_its_length_beside_the_job_that_is_drawn():
    async def fill():
        jobs = Jobs(waiting=1)
        numbers = itertools.count()
        jobs.worker = SimpleNamespace(submit=lambda job: next(numbers))
        for _ in range(2):
            jobs.submit(Job(ModelChoice()))
        with pytest.raises(Busy, match="too many requests wait"):
            jobs.submit(Job(ModelChoice()))
        assert len(jobs) == 2

    asyncio.run(fill())


def test_addresses_of_pictures_expire():
    now = 0.0
    store = PictureStore(60, limit=25, clock=lambda: now)
    store.add("a", bytes(10))
    now = 30.0
    store.add("b", bytes(10))
    assert store.get("a") == store.get("b") == bytes(10)
    now = 60.0
    assert (store.get("a"), store.get("b")) == (None, bytes(10))
    store.add("c", bytes(10))
    store.add("d", bytes(10))
    assert (store.get("b"), store.get("c"), store.get("d")) == (None, bytes(10), bytes(10))
    now = 1000.0
    assert store.get("d") is None
    store.add("e", bytes(20))
    assert store.get("e") == bytes(20)


def test_a_slow_reader_misses_previews_but_never_the_picture():
    drawing, half = Drawing(1), bytes(5 << 20)
    for index in range(5):
        drawing.put(Progress(1, 0, index, 6, 7, (32, 32), half))
    drawing.put(Progress(1, 0, 5, 6, 7, (32, 32), None))
    drawing.put(Finished(1))

    async def read():
        return [await drawing.get() for _ in range(3)]

    first, latest, end = asyncio.run(read())
    assert (first.index, latest.index, end) == (0, 4, Finished(1))


# --- load ---------------------------------------------------------------------------------------


def rude(port, kind):
    """Connect, misbehave, leave."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as s:
        body = json.dumps({"prompt": "a cat", "steps": 100, "n": 10, "stream": kind == "leaves"})
        head = (
            f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        if kind == "half":
            s.sendall(f"{head}Content-Length: 500\r\n\r\n{{".encode())
        elif kind == "noise":
            s.sendall(os.urandom(200) + b"\r\n\r\n")
        else:
            s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            if kind == "leaves":
                s.recv(100)
            else:
                time.sleep(0.2)


def test_fifty_clients_some_of_them_rude(server):
    process, port = server
    ask(port, prompt="a cat", steps=1)
    [expected] = ask(port, prompt="a cat", steps=1, seed=0)[2]["data"]
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        kinds = ["leaves", "silent", "half", "noise"] * 3
        rudes = [pool.submit(rude, port, kind) for kind in kinds]
        polite = [pool.submit(patiently, port, prompt="a cat", steps=1, seed=k % 2)
                  for k in range(38)]  # fmt: skip
        for future in rudes:
            future.result()
        answers = [future.result() for future in polite]
    assert all(answer[0] == 200 for answer, _ in answers)
    assert sum(refused for _, refused in answers) > 0
    pictures = {answer[2]["data"][0]["b64_json"] for answer, _ in answers[::2]}
    assert pictures == {expected["b64_json"]}
    assert idle(port), "a request that nobody waits for stayed open"
    if sys.platform == "linux":
        before = memory(process.pid)
        for k in range(40):
            assert patiently(port, prompt="a cat", steps=1, seed=k)[0][0] == 200
        assert memory(process.pid) < before + 20


def test_a_client_that_leaves_stops_the_drawing(port):
    for kind in ("leaves", "silent"):
        rude(port, kind)
        assert idle(port)


def worker_of(process):
    """Process ID of the server's worker."""
    if sys.platform != "linux":
        pytest.skip("reads processes from /proc")
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    names = {p: Path(f"/proc/{p}/cmdline").read_text() for p in children}
    [worker] = [p for p, name in names.items() if "spawn_main" in name]
    return worker


def cpu_ticks(process):
    """CPU time of a process, in hundredths of a second."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def start_with_step_timeout(model_folder):
    """A server, its port, and its `--step-timeout`: 4 s, or what a busy machine needs.

    A step has to be far quicker than that, as has the start of a process that draws.
    """
    timeout = 4
    while True:
        began = time.monotonic()
        try:
            process, port = start("--model", model_folder, "--step-timeout", timeout)
        except AssertionError as error:
            assert f"no step in {timeout} s" in str(error)
        else:
            if time.monotonic() - began < timeout:
                return process, port, timeout
            stop(process)
        timeout = max(2 * timeout, math.ceil(2 * (time.monotonic() - began)))


def test_a_worker_that_hangs_is_replaced(model_folder):
    process, port, timeout = start_with_step_timeout(model_folder)
    try:
        worker = worker_of(process)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            hung = pool.submit(ask, port, prompt="a cat", steps=100, n=10)
            while ask(port, "GET", "/health")[2]["open_requests"] < 1:
                time.sleep(0.01)
            os.kill(worker, signal.SIGSTOP)
            waiting = [pool.submit(ask, port, prompt="a cat", steps=1, seed=k) for k in (1, 2)]
            seen = []
            while not (seen and seen[-1][2]["worker_restarts"]):
                seen.append(ask(port, "GET", "/health"))
                time.sleep(0.1)
            stalled = [answer for answer in seen if answer[0] == 503]
            assert stalled and {answer[2]["status"] for answer in stalled} == {"stalled"}
            status, _, body = hung.result()
            assert (status, body["error"]["type"]) == (500, "server_error")
            assert f"no step in {timeout} s" in body["error"]["message"]
            assert [future.result()[0] for future in waiting] == [200, 200]
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
        status, _, health = ask(port, "GET", "/health")
        assert (status, health["status"], health["open_requests"]) == (200, "ok", 0)
        stop(process)
    finally:
        process.kill()


def test_a_second_signal_ends_at_once(model_folder):
    process, port = start("--model", model_folder)
    try:
        worker = worker_of(process)
        half = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        half += b"application/json\r\nContent-Length: 100\r\n\r\n"
        with (
            concurrent.futures.ThreadPoolExecutor(1) as pool,
            socket.create_connection(("127.0.0.1", port)) as client,
        ):
            # The server waits 10 s for the rest of this request.
            client.sendall(half)
            answer = pool.submit(ask, port, prompt="a cat", steps=100, n=10, size="128x64")
            while ask(port, "GET", "/health")[2]["open_requests"] < 1:
                time.sleep(0.01)
            os.kill(worker, signal.SIGSTOP)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            started = time.monotonic()
            stop(process)
            assert time.monotonic() - started < 5
            # An error, if the connection is not cut before it.
            with contextlib.suppress(http.client.HTTPException, OSError):
                assert answer.result()[0] in (500, 503)
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    finally:
        process.kill()


def test_a_worker_that_dies_is_replaced(server):
    process, port = server
    worker = worker_of(process)
    before = ask(port, "GET", "/health")[2]["worker_restarts"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        idle = cpu_ticks(worker)
        answer = pool.submit(ask, port, prompt="a cat", steps=100, n=10)
        # Before it begins to draw, another process would get the request.
        while cpu_ticks(worker) < idle + 5:
            time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)
        status, _, body = answer.result()
    assert (status, body["error"]["type"]) == (500, "server_error")
    assert ask(port, prompt="a cat", steps=1)[0] == 200
    assert ask(port, "GET", "/health")[2]["worker_restarts"] == before + 1


def test_a_worker_that_is_killed_between_two_requests_is_not_noticed(server):
    process, port = server
    assert ask(port, prompt="a cat", steps=1)[0] == 200
    before = ask(port, "GET", "/health")[2]["worker_restarts"]
    worker = worker_of(process)
    os.kill(worker, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, port, prompt="a cat", steps=1)
        while ask(port, "GET", "/health")[2]["open_requests"] == 0:
            time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)
        assert answer.result()[0] == 200
    assert ask(port, "GET", "/health")[2]["worker_restarts"] == before + 1


# --- the command, with a key --------------------------------------------------------------------


def test_a_key_a_real_client_and_an_end_in_the_middle(model_folder):
    process, port = start("--model", model_folder, "--api-key", "secret", "--host", "127.0.0.1")
    try:
        for key in (None, "wrong"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            status, _, answer = ask(port, "GET", "/v1/models", headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(port, "GET", "/health")[0] == 200
        headers = {"Authorization": "Bearer secret", "Host": "a.name"}
        assert ask(port, "GET", "/v1/models", headers)[0] == 200
        # Told to end, it finishes what it draws.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, port, headers=headers, prompt="a cat", steps=60, n=2)
            while ask(port, "GET", "/health")[2]["open_requests"] == 0:
                time.sleep(0.01)
            stop(process)
            assert answer.result()[0] == 200
    finally:
        process.kill()


def test_the_openai_client(port):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["random", "random-tiny"]
    extra = {"seed": 7, "steps": 3}
    picture = client.images.generate(model="random", prompt="a cat", extra_body=extra)
    assert opened(picture.data[0].b64_json).size == (64, 32)
    stream = client.images.generate(
        model="random", prompt="a cat", stream=True, partial_images=2, extra_body=extra
    )
    events = list(stream)
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [e.type for e in events] == kinds
    assert events[-1].b64_json == picture.data[0].b64_json
    events = client.images.generate(
        model="random", prompt="a zebra", stream=True, partial_images=1, size="512x512",
        extra_body=extra | {"upscale": True},
    )  # fmt: skip
    events = list(events)
    assert [e.size for e in events] == ["512x512"] * 2
    assert [opened(e.b64_json).size for e in events] == [(512, 512)] * 2
    [notice] = events[-1].notices
    assert "nothing that this model can draw" in notice
    with pytest.raises(openai.BadRequestError, match="more than the 8192"):
        client.images.generate(prompt="a cat", size="330x320")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat", model="dall-e-2")


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has 127.0.0.1 alone")
def test_every_loopback_address_works(model_folder):
    process, port = start("--model", model_folder, "--host", "127.0.0.2", host="127.0.0.2")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.2", port)) as connection:
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
    stop(process)


def test_the_service_files_start_the_server():
    folder = ROOT / "apps/server/services"
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(folder / "mlx-snapgen.service")
    assert {"MemoryMax", "TasksMax", "LimitNOFILE", "CPUQuota"} <= unit["Service"].keys()
    plist = plistlib.loads((folder / "mlx-snapgen.plist").read_bytes())
    assert plist["HardResourceLimits"]["NumberOfFiles"] >= 2 * connection.CONNECTIONS
    for command in (unit["Service"]["ExecStart"].split(), plist["ProgramArguments"]):
        assert command[1:3] == ["-m", "apps.server"]
        args = build_parser().parse_args(command[3:])
        assert args.host == "127.0.0.1"
    for patience in (unit["Service"]["TimeoutStopSec"], plist["ExitTimeOut"]):
        assert int(patience) > connection.GRACE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "set an --api-key"),
        (["--api-key", "two words"], "no spaces"),
        (["--api-key", "schlüssel"], "no spaces"),
        (["--api-key", ""], "no spaces"),
        (["--model", "/no/such/folder"], "no model folder /no/such/folder"),
        (["--model", "a", "b", "--revision", "main"], "are for one --model"),
        (["--model", "a", "--base", "b"], "--base is for models that are one .safetensors file"),
        (
            ["--model", "a.safetensors", "b", "c.safetensors", "--base", *"xyz"],
            "--base has 3 models and --model 2 files: give one for all, or one for each file",
        ),
        (["--alias", "gpt-image-1"], "takes NAME=MODEL, not 'gpt-image-1'"),
        (["--unload-after", "0"], "not above 0"),
        (["--host", "no.such.host.invalid", "--api-key", "x"], "cannot listen on"),
    ],
)
def test_mistakes_are_one_line(options, words):
    env = {k: v for k, v in os.environ.items() if k != "MLX_SNAPGEN_API_KEY"}
    result = subprocess.run(
        [sys.executable, "-m", "apps.server", "--port", "0", *options],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    # A slow machine also prints that it loads the model.
    assert words in result.stderr.splitlines()[-1]
    assert result.stderr.count("error: ") == 1
