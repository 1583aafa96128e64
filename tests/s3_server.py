"""A real S3 server on loopback for tests and benchmarks, and a proxy before it that counts and misbehaves on demand."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "test-secret-of-the-loopback-server"
REGION = "us-east-1"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
START_TIMEOUT_S = 60.0
_IDENTITY = {
    "name": "tests",
    "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint URL of a SeaweedFS server with an empty store, ready to serve; gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="media-assets-s3-"))
    identities = folder / "identities.json"
    identities.write_text(json.dumps({"identities": [_IDENTITY]}))
    # Sockets of gRPC are the HTTP ports plus 10,000 unless they are named.
    names = ("master", "master-grpc", "volume", "volume-grpc", "filer", "filer-grpc", "s3", "s3-grpc")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        str(Path(sys.executable).with_name("weed")),
        "-logtostderr=true",
        "server",
        "-ip=127.0.0.1",
        f"-dir={folder}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=1000",
        "-s3",
        "-iam=false",
        # Fixed ports else, which another program of the machine may have.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={identities}",
        *(f"-{name.replace('-', '.port.') if '-' in name else name + '.port'}={port}" for name, port in ports.items()),
        f"-filer.localSocket={folder}/filer.sock",
        f"-s3.localSocket={folder}/s3.sock",
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        stack.callback(_end, process, ports)
        url = f"http://127.0.0.1:{ports['s3']}"
        _wait_until_writable(url, process, folder / "log")
        yield url


def client(endpoint: str) -> Any:
    """A boto3 client of the test server; independent of the project's own."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )


@dataclass
class Seen:
    """One request that passed the proxy: bytes of the answer's body included."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    served: int


@dataclass
class Proxy:
    """A reverse proxy that records every request; `meddle` may change a body on its way or answer by itself."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    meddle: Callable[[str, str, bytes], bytes | int] | None = None

    def served(self, key: str, method: str = "GET") -> int:
        """Bytes served for paths that end in `key`."""
        return sum(s.served for s in self.seen if s.method == method and urlsplit(s.path).path.endswith(key))

    def requests(self, method: str, part: str = "") -> list[Seen]:
        """Requests of a method whose path and query hold `part`."""
        return [s for s in self.seen if s.method == method and part in s.path]


@contextmanager
def s3_proxy(target: str) -> Iterator[Proxy]:
    """A counting proxy before `target` on a port of its own."""
    backend = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if proxy.meddle is not None:
                changed = proxy.meddle(self.command, self.path, body)
                if isinstance(changed, int):
                    self._answer(changed, [], b"")
                    return
                body = changed
            upstream = http.client.HTTPConnection(backend, timeout=60)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            content = response.read()
            self._answer(response.status, response.getheaders(), content)
            upstream.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            proxy.seen.append(Seen(self.command, self.path, dict(self.headers.items()), status, len(content)))
            self.send_response_only(status)
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass  # noqa: N815 - the names are the library's

        def log_message(self, *_: object) -> None:
            """Nothing to the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_writable(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a bucket can be made and an object written: the parts of the server come up one after the other."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except urllib.error.HTTPError:
            if _writable(url):
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _writable(url: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        store = client(url)
        store.create_bucket(Bucket="ready")
        store.put_object(Bucket="ready", Key="ready", Body=b"ready")
    except (BotoCoreError, ClientError):
        return False
    return True


def _end(process: subprocess.Popen[bytes], ports: Mapping[str, int]) -> None:
    process.kill()
    process.wait(10)
    for name, port in ports.items():  # where the server puts them cannot be told
        Path(f"/tmp/seaweedfs-{name}-{port}.sock").unlink(missing_ok=True)
