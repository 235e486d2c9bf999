"""
A server on loopback that speaks as much of the Hub's protocol as pushing and loading a model needs.

Repositories live in memory. `faults` maps a part of a path to what is answered there, once for each entry: a status, or
"cut" to drop the connection in the middle.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"
LFS = (".safetensors", ".bin", ".ckpt")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path, _, query = self.path.partition("?")
        hub.requests.append((self.command, path))
        for part, answers in hub.faults.items():
            if part in f"{self.command} {path}" and answers:
                fault = answers.pop(0)
                if fault == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(b"half")
                    self.close_connection = True
                    return
                self.answer(fault, {"error": f"fault {fault}"})
                return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            self.answer(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
            return
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                with hub.lock:
                    function(self, hub, body, query, *match.groups())
                return
        self.answer(404, {"error": f"no route {path}"})

    def answer(self, status, content=b"", headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def create(handler, hub, body, query):
    content = json.loads(body)
    name = f"{content.get('organization') or 'user'}/{content['name']}"
    status = 409 if name in hub.repositories else 200
    private = content.get("private", content.get("visibility") == "private")
    hub.repositories.setdefault(name, {"private": private, "revisions": {"main": {}}, "shas": {}})
    handler.answer(status, {"url": f"{hub.url}/{name}", "id": name, "name": name})


def validate(handler, hub, body, query):
    handler.answer(200, {"errors": [], "warnings": []})


def preupload(handler, hub, body, query, name, revision):
    files = [
        {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular", "shouldIgnore": False}
        for file in json.loads(body)["files"]
    ]
    handler.answer(200, {"files": files})


def batch(handler, hub, body, query, name):
    objects = []
    for item in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
        objects.append(item if item["oid"] in hub.blobs else {**item, "actions": upload})
    handler.answer(200, {"transfer": "basic", "objects": objects})


def store(handler, hub, body, query, oid):
    if hashlib.sha256(body).hexdigest() == oid:
        hub.blobs[oid] = body
        handler.answer(200)
    else:
        handler.answer(400, {"error": "wrong sum"})


def commit(handler, hub, body, query, name, revision):
    repository = hub.repositories[name]
    files = dict(repository["revisions"]["main"])
    for line in body.decode().splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "deletedFile":
            files.pop(value["path"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
    revision = "refs/pr/1" if "create_pr=1" in query else "main"
    repository["revisions"][revision] = files
    sha = sha_of(files)
    repository["shas"][sha] = files
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"}
    if revision != "main":
        answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/1"
    handler.answer(200, answer)


def sha_of(files):
    return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()


def files_of(handler, hub, name, revision):
    repository = hub.repositories.get(name)
    if repository is None:
        handler.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return None
    revision = revision.replace("%2F", "/")
    files = repository["shas"].get(revision, repository["revisions"].get(revision))
    if files is None:
        handler.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
    return files


def describe(handler, hub, body, query, name, revision=None):
    files = files_of(handler, hub, name, revision or "main")
    if files is not None:
        siblings = [{"rfilename": path} for path in files]
        private = hub.repositories[name]["private"]
        handler.answer(200, {"id": name, "sha": sha_of(files), "siblings": siblings, "private": private})


def entry_of(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def tree(handler, hub, body, query, name, revision, folder):
    files = files_of(handler, hub, name, revision)
    if files is not None:
        start = (folder or "").strip("/")
        handler.answer(200, [entry_of(path, data) for path, data in files.items() if path.startswith(start)])


def paths_info(handler, hub, body, query, name, revision):
    files = files_of(handler, hub, name, revision)
    if files is not None:
        asked = json.loads(body)["paths"]
        handler.answer(200, [entry_of(path, data) for path, data in files.items() if path in asked])


def resolve(handler, hub, body, query, name, revision, path):
    files = files_of(handler, hub, name, revision)
    if files is None:
        return
    if path not in files:
        handler.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        return
    data = files[path]
    hasher = hashlib.sha256 if path.endswith(LFS) else hashlib.sha1
    headers = {"X-Repo-Commit": sha_of(files), "ETag": f'"{hasher(data).hexdigest()}"', "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if wanted:
        hub.ranges.append((path, handler.headers["Range"]))
        part = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
        handler.answer(206, part, headers)
    else:
        handler.answer(200, data, {**headers, "Content-Length": str(len(data))})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (["POST"], r"/api/repos/create", create),
    (["POST"], r"/api/validate-yaml", validate),
    (["POST"], rf"/api/models/{NAME}/preupload/([^/]+)", preupload),
    (["POST"], rf"/api/models/{NAME}/commit/([^/]+)", commit),
    (["POST"], rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    (["PUT"], r"/lfs/(\w+)", store),
    (["GET"], rf"/api/models/{NAME}", describe),
    (["GET"], rf"/api/models/{NAME}/revision/([^/]+)", describe),
    (["GET"], rf"/api/models/{NAME}/tree/([^/]+)(/.*)?", tree),
    (["POST"], rf"/api/models/{NAME}/paths-info/([^/]+)", paths_info),
    (["GET", "HEAD"], rf"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]


@contextmanager
def serve():
    """A running server with its `url`, `repositories`, `blobs`, `faults` and the `requests` and `ranges` it got."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock = threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.blobs, server.faults, server.requests, server.ranges = {}, {}, {}, [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
