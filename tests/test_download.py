"""`medibuddy download` with the real hub client against a local server that answers as the hub does and breaks off in the middle of the weights."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import medibuddy

from medibuddy.models.loaders import EMBEDDED_MODEL

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    "One repository, owner/tiny"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        store = self.server.store
        if "/owner/tiny/tree/" in self.path:
            return self.reply(200, json.dumps([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in store.files.items()]).encode(), Content_Type="application/json")
        if self.path.startswith("/api/models/owner/tiny"):
            body = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name, "size": len(data)} for name, data in store.files.items()]}
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        found = re.fullmatch(rf"/owner/tiny/resolve/{COMMIT}/(.+)", self.path.partition("?")[0])
        if not found or found[1] not in store.files:
            return self.reply(404, X_Error_Code="RepoNotFound" if "/owner/tiny/" not in self.path else "EntryNotFound")
        name, data = found[1], store.files[found[1]]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if self.command == "GET":
            store.asked.append((name, start))
        facts = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if start:
            return self.reply(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **facts)
        if self.command == "GET" and name == store.broken and not store.mended:
            store.mended = True
            self.send_response(200)
            for key, value in {"Content-Length": len(data), **facts}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(data[: len(data) * 9 // 10])
            self.close_connection = True
            return None
        return self.reply(200, data, **facts)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    "The server; its files are the embedded model's, and what a published repository holds beside them"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {path.name: path.read_bytes() for path in EMBEDDED_MODEL.iterdir() if path.is_file()}
    files["model.safetensors"] = bytes(range(250)) * 100_000  # the client keeps what came in pieces of 10 MB
    server.store = type("Store", (), {"files": files | {"pytorch_model.bin": b"\x80\x04", "original/consolidated.00.safetensors": b"x", "modeling_tiny.py": b"x"}, "asked": [], "broken": "model.safetensors", "mended": False})()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, tmp_path):
    folder, weights = tmp_path / "model", hub.store.files["model.safetensors"]
    done = medibuddy("download", "owner/tiny", "--to", folder, "--json", env=hub.env)
    if done.returncode:  # the client gave up; the same command again
        done = medibuddy("download", "owner/tiny", "--to", folder, "--json", env=hub.env)
    assert done.returncode == 0, done.stderr
    starts = [start for name, start in hub.store.asked if name == "model.safetensors"]
    assert starts[0] == 0 and len(starts) == 2 and starts[1] >= 10e6, starts
    assert (folder / "model.safetensors").read_bytes() == weights
    facts = json.loads(done.stdout)
    assert facts["revision"] == COMMIT and json.loads((folder / "source.json").read_text()) == {"model": "owner/tiny", "revision": COMMIT}
    assert not {name for name, _ in hub.store.asked} & {"pytorch_model.bin", "original/consolidated.00.safetensors", "modeling_tiny.py"}
    assert {path.name for path in EMBEDDED_MODEL.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")} <= {path.name for path in Path(folder).iterdir()}


def test_what_cannot_be_downloaded_is_said(hub, tmp_path, call, monkeypatch):
    done = medibuddy("download", "owner/missing", env=hub.env)
    assert done.returncode == 2 and "is not on the hub, or is private" in done.stderr and "Traceback" not in done.stderr
    hub.store.files.pop("model.safetensors")
    done = medibuddy("download", "owner/tiny", env=hub.env)
    assert done.returncode == 2 and "no weights as safetensors" in done.stderr and not hub.store.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = call("download", "owner/tiny")
    assert status == 2 and "HF_HUB_OFFLINE is set" in err
