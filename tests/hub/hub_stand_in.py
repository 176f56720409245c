"""A small server that speaks what huggingface_hub asks of the Hub to make a repository and fill it."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import yaml

TOKEN = "hf_a_token_of_a_test"


class HubStandIn:
    """Holds repositories in memory: name -> path -> bytes.

    Use as a context manager; `url` is its address, `requests` what was asked of it. If it is `full`, it takes
    no files.
    """

    def __init__(self):
        self.repositories, self.private, self.objects, self.requests = {}, {}, {}, []
        self.full = False
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_PUT(self):
                stand_in.answer(self)

            do_POST = do_PUT

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def replace_the_hub(self, monkeypatch):
        """Lets this process take it for the real one."""
        constants = huggingface_hub.constants
        for name, value in (("ENDPOINT", self.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path))
        status, content = self._reply(request.command, path, body, request.headers.get("Authorization"))
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def save(self, repo_id, folder):
        """Writes a repository to a folder, as a download would."""
        for name, content in self.repositories[repo_id].items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _reply(self, method, path, body, authorization):
        if method == "PUT":  # an address that the batch below gave out; signed, so without a token
            self.objects[path.rsplit("/", 1)[1]] = body
            return (403, {"error": "Over the quota"}) if self.full else (200, {})
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            front_matter = json.loads(body)["content"].split("---\n")[1]
            sound = isinstance(yaml.safe_load(front_matter), dict)
            return (200 if sound else 400), {"errors": [], "warnings": []}
        repo_id = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if repo_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in files}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repositories[repo_id][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repositories[repo_id][value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/1", "commitOid": "1"}
        return 404, {"error": f"The stand-in has no {path}"}

    def _create(self, wanted):
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if wanted["organization"] == "others":
            return 403, {"error": "You may not write there"}
        status = 409 if repo_id in self.repositories else 200
        self.repositories.setdefault(repo_id, {})
        self.private.setdefault(repo_id, wanted.get("private", wanted.get("visibility") == "private"))
        return status, {"url": f"{self.url}/{repo_id}"}
