"""The inventory of a large prefix in ticks, beside the stock way: list everything, every tick.

    python -m benchmarks.inventory [--keys 200000] [--page 1000] [--budget 25] [--quiet 3] [--seaweedfs]

A child process answers ListObjectsV2 and HEAD over HTTP on loopback as S3 does (1,000 keys per page, in the order of
the bytes); a real store would need a quarter of an hour to be filled with 200,000 keys here. `--seaweedfs` fills and
lists a real SeaweedFS server instead; use fewer keys.

1. inventory: ticks of s3_inventory_sensor, one process each, until a pass is complete: registry on a PostgreSQL of its
   own, partitions in the Dagster instance, the cursor handed on. A few keys are removed and added half-way.
2. quiet: more ticks over the unchanged prefix.
3. stock: `dagster_aws.s3.sensor.get_objects`, which a sensor after Dagster's documentation calls in every tick; it
   lists and sorts only, and registers nothing.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests import s3_server

PROJECT = Path(__file__).parents[1]
BUCKET, PREFIX = "library", "media/"

TICK = """
import json, resource, sys, time
import dagster as dg
from cli.instance import open_instance
from resources.library import Library
from sensors.s3_inventory import build_s3_inventory_sensor

library = Library.open(sys.argv[1])
instance = open_instance(library)
sensor = build_s3_inventory_sensor(library.settings)
library.registry.known([])
for line in sys.stdin:
    started = time.perf_counter()
    result = sensor(dg.build_sensor_context(instance, cursor=json.loads(line), resources={"media": library}))
    print(json.dumps({
        "seconds": time.perf_counter() - started,
        "cursor": result.cursor,
        "text": str(result.skip_reason.skip_message),
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }), flush=True)
"""

STOCK = """
import json, resource, sys, time
import boto3
from dagster_aws.s3.sensor import get_objects

client = boto3.client("s3", endpoint_url=sys.argv[1])
started = time.perf_counter()
found = get_objects(sys.argv[2], sys.argv[3], client=client)
seconds = time.perf_counter() - started
print(json.dumps({"keys": len(found), "seconds": seconds,
                  "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""

AUDIT = """
import json, sys
import sqlalchemy as sa
from cli.instance import open_instance
from media_assets.orchestration.partitions import MEDIA
from resources.library import Library

library = Library.open(sys.argv[1])
with library.database.engine.connect() as connection:
    rows = connection.execute(sa.text("select count(*), count(distinct uri) from uploads")).one()
    live = sorted(connection.execute(sa.text("select uri from uploads where state = 'live'")).scalars())
partitions = len(open_instance(library).get_dynamic_partitions(MEDIA))
print(json.dumps({"rows": rows[0], "uris": rows[1], "live": live, "partitions": partitions}))
"""


def keys(count: int) -> list[str]:
    """`count` keys in a hundred folders, in the order of their bytes."""
    return sorted(f"{PREFIX}{number % 100:02d}/clip {number:07d}.mp4" for number in range(count))


class Responder(BaseHTTPRequestHandler):
    """ListObjectsV2, HEAD, PUT and DELETE over a sorted list of keys."""

    protocol_version = "HTTP/1.1"
    keys: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """A listing."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        start = max(bisect.bisect_left(self.keys, prefix), bisect.bisect_right(self.keys, after))
        size = int(query.get("max-keys", ["1000"])[0])
        page = [key for key in self.keys[start : start + size] if key.startswith(prefix)]
        more = start + size < len(self.keys) and self.keys[start + size].startswith(prefix)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        entries = "".join(
            f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"{hash(key) & 0xFFFFFFFFFFFF:032x}"</ETag><Size>1000000</Size>'
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in page
        )
        self._send(
            (
                '<?xml version="1.0" encoding="UTF-8"?>'
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
                f"<MaxKeys>{size}</MaxKeys><EncodingType>url</EncodingType>"
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
            ).encode()
        )

    def do_HEAD(self) -> None:
        """Whether a key is there."""
        at = bisect.bisect_left(self.keys, key := self._key())
        self._send(b"", 200 if self.keys[at : at + 1] == [key] else 404)

    def do_PUT(self) -> None:
        """Add a key."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bisect.insort(self.keys, self._key())
        self._send(b"")

    def do_DELETE(self) -> None:
        """Remove a key."""
        self.keys.remove(self._key())
        self._send(b"", 204)

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing to the terminal."""


def respond(count: int) -> None:
    """Serve until killed; the first line on stdout is the port."""
    Responder.keys = keys(count)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Responder)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def responder(count: int) -> Iterator[str]:
    """Endpoint of the listing process."""
    command = [sys.executable, __file__, "--respond", "--keys", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": "0"}) as child:
        assert child.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.kill()


@contextmanager
def seaweedfs(count: int) -> Iterator[str]:
    """Endpoint of a SeaweedFS server that holds the keys."""
    with s3_server.s3_server() as url:
        client = s3_server.client(url)
        client.create_bucket(Bucket=BUCKET)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: client.put_object(Bucket=BUCKET, Key=key, Body=b""), keys(count)))
        yield url


class Ticks:
    """A process whose sensor is evaluated once per line, as in the daemon's code server."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", TICK, str(home)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=PROJECT
        )

    def tick(self, cursor: str | None) -> dict[str, Any]:
        """Seconds, cursor, sentence and peak memory (MB) of one evaluation."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(cursor) + "\n")
        self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        print(f"{answer['seconds']:8.2f} s  {answer['rss_mb']:6.0f} MB  {answer['text']}", file=sys.stderr)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(60)


def passes(cursor: str) -> int:
    """Complete listings so far."""
    done: int = json.loads(cursor)["prefixes"][f"s3://{BUCKET}/{PREFIX}"]["passes"]
    return done


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--page", type=int, default=1000)
    parser.add_argument("--budget", type=float, default=25.0, help="seconds per tick")
    parser.add_argument("--quiet", type=int, default=3, help="quiet ticks")
    parser.add_argument("--seaweedfs", action="store_true")
    parser.add_argument("--respond", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.respond:
        respond(arguments.keys)
        return
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inventory-")))
        store = seaweedfs if arguments.seaweedfs else responder
        endpoint = stack.enter_context(store(arguments.keys))
        environment = {
            **os.environ,
            **s3_server.ENVIRONMENT,
            "PYTHONPATH": str(PROJECT),
            "MEDIA_S3__ENDPOINT_URL": endpoint,
            "MEDIA_INGESTION__PREFIXES": json.dumps([f"s3://{BUCKET}/{PREFIX}"]),
            "MEDIA_INGESTION__INVENTORY_PAGE": str(arguments.page),
            "MEDIA_INGESTION__TICK_BUDGET_S": str(arguments.budget),
        }
        figures = measure(arguments, home, endpoint, environment)
    for name, value in figures.items():
        print(f"{name:>24}  {value}")
    versions = {name: version(name) for name in ("media-assets", "dagster", "dagster-aws", "boto3")}
    print(json.dumps({"name": "inventory", **figures, "python": platform.python_version(), "versions": versions}))


def measure(arguments: argparse.Namespace, home: Path, endpoint: str, environment: dict[str, str]) -> dict[str, Any]:
    """All figures of one invocation."""
    client = s3_server.client(endpoint)
    expected = set(keys(arguments.keys))
    ticks: list[dict[str, Any]] = []
    cursor: str | None = None
    while cursor is None or not passes(cursor):
        # A new process per tick: nothing but the cursor and the registry is carried over.
        process = Ticks(home, environment)
        ticks.append(process.tick(cursor))
        cursor = str(ticks[-1]["cursor"])
        process.close()
        if len(ticks) == 1 and not passes(cursor):
            first, last = min(expected), max(expected)
            client.delete_object(Bucket=BUCKET, Key=last)
            client.put_object(Bucket=BUCKET, Key=last + ".new", Body=b"")
            expected = expected - {last} | {last + ".new"}
            resume = json.loads(cursor)["prefixes"][f"s3://{BUCKET}/{PREFIX}"]["after"]
            if resume != first:
                client.delete_object(Bucket=BUCKET, Key=resume)
    audit = json.loads(run([sys.executable, "-c", AUDIT, str(home)], environment))
    live = {uri.removeprefix(f"s3://{BUCKET}/") for uri in audit["live"]}
    process = Ticks(home, environment)
    quiet = [process.tick(cursor) for _ in range(arguments.quiet)]
    process.close()
    pages = sum(int(each["text"].split(" pages")[0].rsplit(" ", 1)[1]) for each in ticks)
    quiet_pages = [int(each["text"].split(" pages")[0].rsplit(" ", 1)[1]) for each in quiet]
    stock = json.loads(run([sys.executable, "-c", STOCK, endpoint, BUCKET, PREFIX], environment))
    return {
        "store": "SeaweedFS" if arguments.seaweedfs else "ListObjectsV2 responder",
        "keys": arguments.keys,
        "page": arguments.page,
        "ticks": len(ticks),
        "pages": pages,
        "tick_s_max": round(max(each["seconds"] for each in ticks), 2),
        "keys_per_s": round(arguments.keys / sum(each["seconds"] for each in ticks)),
        "rss_mb": round(max(each["rss_mb"] for each in [*ticks, *quiet])),
        "all_live": expected <= live,
        "registered_once": audit["rows"] == audit["uris"] == audit["partitions"],
        "quiet_pages_per_tick": quiet_pages,
        "quiet_tick_s": round(max(each["seconds"] for each in quiet), 3),
        "stock_pages_per_tick": -(-stock["keys"] // 1000),
        "stock_tick_s": round(stock["seconds"], 2),
        "stock_rss_mb": round(stock["rss_mb"]),
        "quiet_ratio": round(stock["seconds"] / max(each["seconds"] for each in quiet), 1),
    }


def run(command: list[str], environment: dict[str, str]) -> str:
    """stdout of a process."""
    return subprocess.run(command, env=environment, cwd=PROJECT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
