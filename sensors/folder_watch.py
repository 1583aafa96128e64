"""What changed below watched folders: finished new files, removed ones, and what cannot be told yet."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from resources.errors import printable
from resources.ingest.discovery import LocalFile, Problem, walk
from resources.ingest.registry import Registry
from resources.ingest.uploads import Removal, Upload, encoded_uri, local_path, uri_of, version_digest
from resources.settings import Ingestion
from sensors.folder_leases import stat_if_closed

MANY = 100
"""More files than this gone at once look like a disk that is not there."""
CANDIDATES = 10_000
"""New and changed files that are watched for being finished, or taken in their first look, at once; the rest has its
turn in the next looks."""
_CONFIRMATIONS = 2
_CLOCK_EVERY = 1000
_DIGEST = 12  # digits of `version_digest`
_SECOND_NS = 1_000_000_000
_TEMPORARY = (
    "~", ".part", ".partial", ".crdownload", ".download", ".tmp", ".temp", ".filepart", ".opdownload", ".swp",
)  # fmt: skip


class Hold(BaseModel):
    """Files of one folder that are missing but not yet believed to be gone."""

    model_config = ConfigDict(frozen=True)

    since: float
    looks: int
    missing: int


class Memory(BaseModel):
    """What one look leaves for the next.

    `unsettled` has, by the time they were first seen so, the version digests of files that may still be
    written to, run together; `holds` the held removals by folder; `told` what was logged last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unsettled: dict[str, str] = {}
    holds: dict[str, Hold] = {}
    told: str = ""
    rest_until: float = 0.0

    def first_seen(self) -> dict[str, float]:
        """Time each unsettled version was first seen, by its digest."""
        return {
            digests[place : place + _DIGEST]: float(moment)
            for moment, digests in self.unsettled.items()
            for place in range(0, len(digests), _DIGEST)
        }


@dataclass(slots=True)
class Look:
    """One look at the watched folders, to be registered: `new` and `gone`; the rest is for people."""

    files: int = 0
    new: list[Upload] = field(default_factory=list)
    gone: list[Removal] = field(default_factory=list)
    unsettled: dict[str, float] = field(default_factory=dict)
    deferred: int = 0
    holds: dict[str, Hold] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def memory(self, told: str, rest_until: float) -> Memory:
        """What the next look needs of this one."""
        grouped: dict[str, list[str]] = {}
        for digest, moment in self.unsettled.items():
            grouped.setdefault(repr(moment), []).append(digest)
        unsettled = {moment: "".join(digests) for moment, digests in grouped.items()}
        return Memory(unsettled=unsettled, holds=self.holds, told=told, rest_until=rest_until)


def watched(folders: Sequence[str]) -> list[str]:
    """The absolute paths of `folders`, those within another left out."""
    paths = sorted({os.path.abspath(local_path(folder) or folder) for folder in folders})
    return [path for path in paths if not any(path != other and _is_below(path, other) for other in paths)]


def look(folders: Sequence[str], registry: Registry, memory: Memory, settings: Ingestion, now: float) -> Look:
    """Compare `folders` (see `watched`) with the registry at `now`, seconds since the epoch.

    New and changed files count once they were seen the same for `folder_quiet_s`, and neither content nor
    inode changed within it; new ones already when `_is_closed` says so. A file is gone when it is not there
    although everything above it could be listed; `_believed` says when many at once are.
    """
    seen = _Scan(time.monotonic() + settings.tick_budget_s, settings.follow_links)
    known: dict[str, dict[str, str]] = {}
    for folder in folders:
        known[folder] = _known_below(registry, folder)
        seen.scan(folder, known[folder])
    found = Look(files=len(seen.uris), problems=seen.problems)
    _settle(found, seen, registry, memory, settings, now)
    if seen.late:
        found.holds = dict(memory.holds)
        found.warnings.append(
            f"Listing did not end within ingestion.tick_budget_s ({settings.tick_budget_s:g} s) after {found.files}"
            " files, so nothing is taken for removed. Raise it, or watch smaller folders."
        )
        return found
    unlisted = {problem.path for problem in seen.problems}
    moment = datetime.fromtimestamp(now, UTC)
    for folder in folders:
        missing = [uri for uri in known[folder] if uri not in seen.uris and _is_gone(uri, folder, unlisted)]
        if missing and _believed(found, folder, missing, len(known[folder]), memory.holds.get(folder), settings, now):
            found.gone += [Removal(uri, moment) for uri in missing]
    return found


class _Scan:
    """The files below several folders, compared with what is known.

    `changed` has new and changed files by their version digests, `replacing` the digests of those whose path is
    registered with another version.
    """

    def __init__(self, deadline: float, follow_links: bool) -> None:
        self.uris: set[str] = set()
        self.changed: list[tuple[str, LocalFile]] = []
        self.replacing: set[str] = set()
        self.problems: list[Problem] = []
        self.late = False
        self._deadline = deadline
        self._follow_links = follow_links
        self._listed: set[tuple[int, int]] = set()

    def scan(self, folder: str, known: Mapping[str, str]) -> None:
        """Walk one folder, unless time is up."""
        for count, entry in enumerate(() if self.late else walk([folder], self._listed, self._follow_links)):
            if count % _CLOCK_EVERY == 0 and time.monotonic() > self._deadline:
                self.late = True
                return
            if isinstance(entry, Problem):
                self.problems.append(entry)
            elif not is_temporary(entry.path):
                uri = entry.uri
                self.uris.add(uri)
                digest = version_digest(uri, entry.etag)
                if not known.get(uri, "").endswith(digest):
                    self.changed.append((digest, entry))
                    if uri in known:
                        self.replacing.add(digest)


def is_temporary(path: str) -> bool:
    """Whether a name says that the file is not finished, as browsers and copying programs mark theirs."""
    name = path.rsplit("/", 1)[-1].lower()
    return name.endswith(_TEMPORARY) or name.startswith("~$")


def _known_below(registry: Registry, folder: str) -> dict[str, str]:
    prefixes = {text.rstrip("/") + "/" for text in (uri_of(folder), encoded_uri(folder))}
    return {uri: key for prefix in prefixes for uri, key in registry.live_below(prefix).items()}


def _settle(
    found: Look,
    seen: _Scan,
    registry: Registry,
    memory: Memory,
    settings: Ingestion,
    now: float,
) -> None:
    """Sort changed files into finished ones and those that may still be written to."""
    first_seen = memory.first_seen()
    moment = datetime.fromtimestamp(now, UTC)
    uploads = {digest: file.upload(moment) for digest, file in seen.changed}
    states = registry.known([upload.media_id for upload in uploads.values()])
    # A purged version stays purged, however long its file lies there.
    open_files = [(d, file) for d, file in seen.changed if states.get(uploads[d].media_id) != "purged"]
    open_files.sort(key=lambda entry: entry[0] not in first_seen)  # stable: waiting ones first, then by name
    at_once = 0
    for place, (digest, file) in enumerate(open_files):
        if len(found.unsettled) + at_once >= CANDIDATES:
            found.deferred = len(open_files) - place
            return
        since = min(first_seen.get(digest, now), now)
        was_seen = digest in first_seen or settings.folder_quiet_s == 0
        quiet = min(now - since, _age(file, now)) >= settings.folder_quiet_s
        if was_seen and quiet:
            found.new.append(uploads[digest])
        elif digest not in seen.replacing and _is_closed(file, settings, now):
            found.new.append(uploads[digest])
            at_once += 1
        else:
            found.unsettled[digest] = since


def _is_closed(file: LocalFile, settings: Ingestion, now: float) -> bool:
    """Whether the version of `file` that was listed is a finished one, by the word of the kernel.

    It has content, is `folder_closed_s` old by both its times, and nobody has it open for writing. An empty file is
    often a name that is yet to be filled.
    """
    info = file.info
    if settings.folder_closed_s >= settings.folder_quiet_s or info.st_size == 0:
        return False
    # A file system of whole seconds could give the next version the same time, and it would never be seen.
    if info.st_ctime_ns % _SECOND_NS == 0 or now - max(info.st_mtime, info.st_ctime) < settings.folder_closed_s:
        return False
    closed = stat_if_closed(file.path)
    return closed is not None and _same(closed, info)


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether nothing was written to a file, and no other put in its place, between two answers of `os.stat`."""
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _age(file: LocalFile, now: float) -> float:
    """Seconds since content or inode changed. A copy may carry an old mtime over, but not the ctime."""
    # Times in the future come from another clock; then only the comparison with the look before counts.
    return now - max((t for t in (file.info.st_mtime, file.info.st_ctime) if t <= now), default=0.0)


def _is_gone(uri: str, folder: str, unlisted: Iterable[str]) -> bool:
    path = local_path(uri) or uri
    above = path
    while _is_below(above, folder):
        if above in unlisted:
            return False
        above = os.path.dirname(above)
    if folder in unlisted:
        return False
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def _believed(
    found: Look, folder: str, missing: Sequence[str], known: int, hold: Hold | None, settings: Ingestion, now: float
) -> bool:
    """Whether `missing` files are gone for good, or their disk may just not be there.

    Up to `MANY` files: at once. More, or all so that the folder is empty: when they are still missing after
    `folder_hold_s`, in two more looks. An empty folder that had more than `MANY` files: never.
    """
    empty = _is_empty(folder)
    if hold is None and len(missing) <= MANY and not empty:
        return True
    name = printable(folder)
    if empty and known > MANY:
        found.warnings.append(
            f"{name} is empty and had {known} files: is its disk mounted? Nothing is removed. If they were deleted on"
            " purpose, put any file there, such as .keep."
        )
        return False
    if hold is None or len(missing) > hold.missing + MANY or hold.since > now:
        hold = Hold(since=now, looks=0, missing=len(missing))
    if hold.looks >= _CONFIRMATIONS and now - hold.since >= settings.folder_hold_s:
        return True
    found.holds[folder] = hold.model_copy(update={"looks": hold.looks + 1})
    found.warnings.append(
        f"{len(missing)} of {known} files below {name} are missing all at once; they are removed if they stay away for"
        f" ingestion.folder_hold_s ({settings.folder_hold_s:g} s)."
    )
    return False


def _is_empty(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:  # it went away since it was listed, and is judged as what it may be: a missing disk
        return True


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
