"""The Hub's own client against a small server that speaks its protocol on the loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tinier.checkpoint import Checkpoint, content_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny: Callable[..., Checkpoint]) -> Iterator[tuple[str, Path, list[str]]]:
    """Serves one model as owner/tiny, branches main and v1; yields its URL, its folder, the paths
    that were asked for."""
    folder = tiny().folder
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            if path in (
                "/api/models/owner/tiny",
                "/api/models/owner/tiny/revision/main",
                "/api/models/owner/tiny/revision/v1",
            ):
                siblings = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                info = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings, "private": False,
                        "tags": [], "downloads": 0}  # fmt: skip
                self._send(json.dumps(info).encode(), "application/json", body=body)
            elif path == f"/api/models/owner/tiny/tree/{COMMIT}":
                files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"}
                         for p in sorted(folder.iterdir())]  # fmt: skip
                self._send(json.dumps(files).encode(), "application/json", body=body)
            elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
                data = (folder / path.rsplit("/", 1)[1]).read_bytes()
                self._send(data, "application/octet-stream", body=body)
            else:
                self.send_error(404)

        def _send(self, data: bytes, kind: str, *, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    server.server_close()
    thread.join()


def tinier_eval(model: str, url: str, cache: Path) -> subprocess.CompletedProcess[str]:
    # a process of its own: the client reads its settings when it is imported
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    command = [sys.executable, "-m", "tinier.cli.main", "eval", model, "--windows", "2",
               "--length", "64", "--json", "--quiet"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | settings
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_model_is_downloaded_measured_and_then_found_in_the_cache(
    hub: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    url, folder, asked = hub
    done = tinier_eval("owner/tiny@v1", url, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["size"]["layers"] == 4
    assert "/api/models/owner/tiny/revision/v1" in asked
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert not any(path.endswith(".bin") for path in asked), "pickle weights were fetched"
    (snapshot,) = (tmp_path / "cache").glob("hub/models--owner--tiny/snapshots/*")
    assert content_hash(snapshot) == content_hash(folder)


def test_a_model_that_the_hub_does_not_have(
    hub: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    done = tinier_eval("owner/other", hub[0], tmp_path / "cache")
    assert done.returncode == 2
    assert "the Hub refused owner/other (revision main)" in done.stderr
