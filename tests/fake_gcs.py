"""A server that answers as Google Cloud Storage's JSON API does, for gcsfs and TensorStore.

What they ask of it: objects with generations and preconditions, ranges, listings with prefix,
delimiter and offsets, uploads whole and in pieces, and moves. Objects are bytes in a dictionary.
The API: https://cloud.google.com/storage/docs/json_api/v1.
"""

import contextlib
import hashlib
import http
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

BUCKET = "runs"
_OBJECTS = f"/storage/v1/b/{BUCKET}/o"
_OBJECT = re.compile(rf"(?:/download)?{_OBJECTS}/([^/]+)")
_MOVE = re.compile(rf"{_OBJECTS}/([^/]+)/moveTo/o/([^/]+)")


class Bucket:
    """Objects by name: their bytes and generation.

    Attributes:
      objects: all of them.
      unfinished: what came of uploads in pieces.
      status: 200, or that of every answer: 404 of a bucket that is not there, 403 of one that may
        not be entered.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.unfinished: dict[str, bytes] = {}
        self.status = 200
        self._generations = itertools.count(1)
        self._lock = threading.Lock()

    def put(self, name: str, content: bytes, wanted: str | None = None) -> dict[str, Any] | None:
        """Writes an object, if it is of the wanted generation ('0': none yet); None if not."""
        with self._lock:
            now = self.objects.get(name, (b"", 0))[1]
            if wanted is not None and int(wanted) != now:
                return None
            self.objects[name] = (content, next(self._generations))
            return self.describe(name)

    def delete(self, name: str, wanted: str | None = None) -> int:
        """Removes an object; the status of the answer."""
        with self._lock:
            if name not in self.objects:
                return 404
            if wanted is not None and int(wanted) != self.objects[name][1]:
                return 412
            del self.objects[name]
            return 204

    def describe(self, name: str) -> dict[str, Any]:
        """An object's metadata."""
        content, generation = self.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(content)),
            "generation": str(generation), "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
            "etag": hashlib.md5(content).hexdigest(), "contentType": "application/octet-stream",
        }  # fmt: skip

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        """The objects that a query asks for; of folders their names."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        with self._lock:
            for name in sorted(self.objects):
                is_before = name < query.get("startOffset", "")
                is_after = "endOffset" in query and name >= query["endOffset"]
                if is_before or is_after or not name.startswith(prefix):
                    continue
                head, cut, _ = name[len(prefix) :].partition(delimiter or "\0")
                if cut:
                    folders.add(prefix + head + cut)
                else:
                    items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    bucket: Bucket

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def _ask(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.bucket.status != 200:
            reason = http.HTTPStatus(self.bucket.status).phrase
            error = {"code": self.bucket.status, "message": reason}
            self._answer(self.bucket.status, {"error": error})
        elif match := _MOVE.fullmatch(url.path):
            self._move(*map(urllib.parse.unquote, match.groups()))
        elif match := _OBJECT.fullmatch(url.path):
            self._object(urllib.parse.unquote(match[1]), query)
        elif url.path == _OBJECTS:
            self._answer(200, self.bucket.list(query))
        elif url.path == f"/upload{_OBJECTS}":
            self._upload(query, body)
        elif url.path == f"/storage/v1/b/{BUCKET}":
            self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        else:
            self._answer(501, {"error": {"code": 501, "message": self.path}})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _ask

    def _object(self, name: str, query: dict[str, str]) -> None:
        if self.command == "DELETE":
            self._answer(self.bucket.delete(name, query.get("ifGenerationMatch")))
            return
        found = self.bucket.objects.get(name)
        if found is None:
            self._answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
            return
        content, generation = found
        headers = {"x_goog_generation": str(generation)}
        if query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304, **headers)
        elif query.get("ifGenerationMatch", str(generation)) != str(generation):
            self._answer(412, **headers)
        elif query.get("alt") != "media":
            self._answer(200, self.bucket.describe(name))
        elif match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            part = content[first : last + 1]
            if not part:
                self._answer(416, **headers)
                return
            headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self._answer(206, part, **headers)
        else:
            self._answer(200, content, **headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        name = query.get("name")
        if query["uploadType"] == "multipart":
            metadata, content = self._parts(body)
            name, body = json.loads(metadata)["name"], content
        if query["uploadType"] == "resumable" and "Content-Range" not in self.headers:
            name = name or json.loads(body)["name"]
            self.bucket.unfinished[str(name)] = b""
            address = f"http://{self.headers['Host']}/upload{_OBJECTS}"
            to = urllib.parse.urlencode(query | {"name": str(name)})
            self._answer(200, Location=f"{address}?{to}")
            return
        if query["uploadType"] == "resumable":
            body = self.bucket.unfinished[str(name)] + body
            if self.headers["Content-Range"].endswith("/*"):
                self.bucket.unfinished[str(name)] = body
                self._answer(308, Range=f"bytes=0-{len(body) - 1}")
                return
        described = self.bucket.put(str(name), body, query.get("ifGenerationMatch"))
        self._answer(412 if described is None else 200, described or b"")

    def _parts(self, body: bytes) -> list[bytes]:
        """Of a body of several parts, each without its headers."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        pieces = re.split(rb"\r?\n?--" + re.escape(boundary[1].encode()), body)[1:-1]
        return [re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1] for piece in pieces]

    def _move(self, name: str, to: str) -> None:
        if name not in self.bucket.objects:
            self._answer(404)
            return
        described = self.bucket.put(to, self.bucket.objects[name][0])
        self.bucket.delete(name)
        self._answer(200, described)

    def log_message(self, *_: Any) -> None:
        """Tells nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Tells nothing of clients that do not wait for an answer."""


@contextlib.contextmanager
def serve() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves one bucket, `gs://runs`; what clients find it by in their environment."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = _Server(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://localhost:{server.server_address[1]}"
    try:
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
