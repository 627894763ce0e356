"""`medibuddy export --push` with the real hub client against a local server that answers as the Hub does, and refuses as it does."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import medibuddy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "a-token-for-this-test"


class Hub(BaseHTTPRequestHandler):
    "Repositories that are written to through the commit API and LFS"

    def log_message(self, *args):
        pass

    def reply(self, status, content=None, **headers):
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        repository = self.server.store.repositories.get(name)
        if repository is None:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.reply(200, {"id": name, "private": repository["private"], "sha": COMMIT, "siblings": []})

    do_HEAD = do_GET

    def do_PUT(self):
        store, data = self.server.store, self.body()
        if store.broken:
            store.broken -= 1
            return self.reply(403, {"error": "the storage refuses"})
        store.large[self.path.rpartition("/")[2]] = data
        store.sent.append(len(data))
        return self.reply(200)

    def do_POST(self):
        store, data = self.server.store, self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":  # the Hub reads a card's header before it takes the card
            header = yaml.safe_load(json.loads(data)["content"].split("---")[1])
            errors = [] if header.get("license") and header.get("tags") else [{"message": "no license"}]
            return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            store.repositories.setdefault(name, {"private": asked.get("private", asked.get("visibility") == "private"), "files": {}})
            return self.reply(200, {"url": f"http://127.0.0.1:{self.server.server_port}/{name}"})
        if "/preupload/" in self.path:
            files = json.loads(data)["files"]
            return self.reply(200, {"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in files]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            where = f"http://127.0.0.1:{self.server.server_port}/lfs"
            return self.reply(200, {"transfer": "basic", "objects": [{"oid": o["oid"], "size": o["size"]} | ({} if o["oid"] in store.large else {"actions": {"upload": {"href": f"{where}/{o['oid']}"}}}) for o in objects]})
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            files = store.repositories[name]["files"]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = store.large[value["oid"]]
            return self.reply(200, {"commitUrl": f"http://127.0.0.1:{self.server.server_port}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.reply(404)


@pytest.fixture
def hub(tmp_path):
    "The server and what a user's environment says of it"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.store = type("Store", (), {"repositories": {"me/open": {"private": False, "files": {}}}, "large": {}, "sent": [], "broken": 0})()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    "A run with its adapter exported"
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("pushed") / "run"))
    done = medibuddy("export", path, "--form", "adapter")
    assert done.returncode == 0, done.stderr
    return path


def test_an_upload_is_private_whole_and_goes_on_after_a_failure(hub, run):
    hub.store.broken = 100
    done = medibuddy("export", run, "--form", "adapter", "--push", "me/gout", env=hub.env)
    assert done.returncode in (1, 2) and "me/gout" in done.stderr and not hub.store.repositories["me/gout"]["files"]
    hub.store.broken = 0
    done = medibuddy("export", run, "--form", "adapter", "--push", "me/gout", "--json", env=hub.env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"]["pushed"].endswith(f"/me/gout/commit/{COMMIT}")
    repository = hub.store.repositories["me/gout"]
    assert repository["private"] is True
    local = {file.name: file.read_bytes() for file in (run / "export/adapter").iterdir()}
    assert repository["files"] == local and "README.md" in local
    assert hashlib.sha256(local["adapter_model.safetensors"]).hexdigest() in hub.store.large
    medibuddy("export", run, "--form", "adapter", "--push", "me/gout", env=hub.env)
    assert len(hub.store.sent) == 1  # the weights went over the line once


@pytest.mark.parametrize(("name", "more", "token", "reason"), [
    ("me/open", [], TOKEN, "exists and is public"), ("me/other", [], "wrong", "a token that may write"), ("me/other", [], "", "set HF_TOKEN"), ("other", [], TOKEN, "owner/name"),
])
def test_refused_without_a_question(hub, run, name, more, token, reason):
    done = medibuddy("export", run, "--form", "adapter", "--push", name, *more, env=hub.env | {"HF_TOKEN": token}, stdin=-3)
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert not any(repository["files"] for repository in hub.store.repositories.values())


def test_public_is_said_explicitly(hub, run):
    assert medibuddy("export", run, "--form", "adapter", "--push", "me/open", "--public", env=hub.env).returncode == 0
    assert "adapter_model.safetensors" in hub.store.repositories["me/open"]["files"]


def test_a_changed_export_is_not_uploaded(run, tmp_path):
    from medibuddy.deploy.push import push_folder
    from medibuddy.run import UsageError

    folder = Path(shutil.copytree(run / "export/adapter", tmp_path / "adapter"))
    (folder / "README.md").write_text("Cures everything.")
    with pytest.raises(UsageError, match="was changed"):
        push_folder(folder, "me/gout")
