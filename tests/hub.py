"""A Hugging Face hub on this machine, for the real client."""

import http.server
import json
import threading
import urllib.parse

from huggingface_hub import constants

from tests.tiny import COMMIT

CHUNK = 1000
"""Bytes of a file that are sent before the connection is cut."""


class Hub:
    """A hub of repositories whose files are those of folders.

    Args:
        folder: of "someone/turbo".
        others: folders by the names of more repositories.
    """

    def __init__(self, folder, **others):
        self.folder, self.asked, self.cut = folder, [], {}
        self.folders = {"someone/turbo": folder, **others}
        self.is_gated = self.is_dying = False
        hub = self

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = urllib.parse.unquote(self.path.split("?")[0])
                repo = next((repo for repo in hub.folders if f"/{repo}/" in f"{path}/"), None)
                if path.startswith("/api/models/") and repo:
                    return self.say(hub.tree(repo) if "/tree/" in path else hub.info(repo))
                name = path.partition(f"/{repo}/resolve/{COMMIT}/")[2]
                if not name:
                    return self.say({}, 404, {"X-Error-Code": "RepoNotFound"})
                if hub.is_gated and name.endswith(".safetensors"):
                    return self.say({}, 403, {"X-Error-Code": "GatedRepo"})
                if not (hub.folders[repo] / name).is_file():
                    return self.say({}, 404, {"X-Error-Code": "EntryNotFound"})
                return self.send(repo, name)

            do_HEAD = do_GET

            def send(self, repo, name):
                data, start = (hub.folders[repo] / name).read_bytes(), 0
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if found := self.headers.get("Range"):
                    start = int(found.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if self.command == "GET":
                    hub.asked.append((name, start))
                self.send_response(206 if start else 200)
                for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    body = data[start:]
                    if hub.cut.get(name, 0) > 0:
                        hub.cut[name] -= 1
                        # A client that gets something tries again without end.
                        body = body[:CHUNK] if start == 0 or not hub.is_dying else b""
                        self.close_connection = True
                    self.wfile.write(body)

            def say(self, values, status=200, headers=None):
                body = json.dumps(values).encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def sizes(self, repo="someone/turbo"):
        folder = self.folders[repo]
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.stat().st_size for path in paths}

    def info(self, repo):
        siblings = [{"rfilename": name, "size": size} for name, size in self.sizes(repo).items()]
        tags = ["license:mit" if repo.startswith("MiniT2I/") else "license:apache-2.0"]
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": tags}

    def tree(self, repo):
        return [
            {"type": "file", "path": name, "size": size, "oid": COMMIT}
            for name, size in self.sizes(repo).items()
        ]

    def names(self):
        return {name for name, _ in self.asked}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, monkeypatch, cache):
        """Let the hub client ask this hub, with an empty cache."""
        url = f"http://127.0.0.1:{self.server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK // 2)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
