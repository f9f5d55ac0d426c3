"""What the hub answers, told in one line: a server on this machine stands for it."""

import http.server
import json
import threading

import mlx.core as mx
import pytest
from huggingface_hub import constants

from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.errors import UserError, show_as
from mlx_snapgen.public.source import find_source
from tests.tiny import COMMIT

FILES = ("config.json", "model.safetensors")


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Makes the hub's address and cache others."""

    def move(port):
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    return move


@pytest.fixture
def hub(at):
    """Has an open repository and a gated one; gives the list of what it was asked for."""
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            name = self.path.split("/")[-1]
            if self.path.startswith(("/api/models/someone/gated/", "/api/models/someone/open/")):
                return self.answer(200, tree() if "/tree/" in self.path else info())
            if "/someone/gated/" in self.path:
                return self.answer(403, {}, {"X-Error-Code": "GatedRepo"})
            if name in FILES:
                config = {"architectures": ["CLIPTextModel"]}
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
                return self.answer(200, config, headers)
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

        do_GET = do_HEAD

        def answer(self, status, values, headers=()):
            body = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    at(server.server_port)
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


def info():
    siblings = [{"rfilename": name} for name in FILES]
    return {"id": "someone/x", "sha": COMMIT, "siblings": siblings, "gated": "manual"}


def tree():
    return [{"type": "file", "path": name, "size": 9, "oid": COMMIT} for name in FILES]


def message(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_gated_repository_tells_the_way_in(hub):
    """Its list of files is open, the files are not."""
    told = message(lambda: find_source("someone/gated"))
    assert told.startswith("someone/gated is gated: ask for access on its page, then run `hf auth")
    assert any("/api/models/someone/gated" in path for path in hub)
    assert any("/someone/gated/resolve/" in path for path in hub)


def test_a_repository_that_is_not_there(hub):
    assert "neither a folder here nor a repository" in message(lambda: find_source("someone/else"))
    assert hub


def test_a_download_that_is_no_checkpoint(hub):
    """A page in place of the file, as captive portals give."""
    source = find_source("someone/open")
    assert source.config == {"architectures": ["CLIPTextModel"]}
    told = message(lambda: source.weights(source.folder))
    assert "model.safetensors is truncated, or no safetensors file: get it again" in told


def test_no_network_is_one_line(at, tmp_path):
    at(9)
    told = message(lambda: find_model("someone/open"))
    assert told == (
        "no folder someone/open, and as a Hugging Face repository it is not in the cache and "
        "cannot be fetched: no connection to Hugging Face; --model also takes a folder"
    )
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x.lora_A.weight": mx.zeros((2, 2))})
    assert find_source(str(tmp_path)).files == (tmp_path / "model.safetensors",)


def test_damaged_files_of_a_cache_keep_their_place_in_messages(tmp_path):
    show_as(tmp_path, "owner/name")
    assert str(UserError(f"{tmp_path} holds no model")) == "owner/name holds no model"
    text = f"{tmp_path}/a.safetensors is truncated: get it again"
    assert str(UserError(text)) == text
