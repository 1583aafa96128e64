"""Permanent deletions of single versions of S3 objects, settled in any order with the uploads of those versions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from resources.ingest.registry import Registered, Registry
from resources.ingest.uploads import Removal, Upload
from resources.records.database import Database


@dataclass(frozen=True, slots=True)
class VersionRemoval:
    """One version of an object was deleted for good; the event does not say whether it was the newest."""

    uri: str
    object_version: str
    observed_at: datetime
    sequencer: str = ""


class VersionedRegistry:
    """Registers uploads, removals and deletions of single versions; telling the same again is harmless.

    Deleting an old version must not remove the current one, and messages come in any order. So a deleted
    version gets a tombstone of its own, and an upload that meets the tombstone of its version is removed as
    of just after its own observation: before every later version. When the version that was current is
    deleted, S3 makes an older one current without an event for it; the next listing tells that.
    """

    def __init__(self, database: Database, registry: Registry) -> None:
        self._engine = database.engine
        self._registry = registry

    def register(
        self, found: Sequence[Upload], gone: Sequence[Removal], versions_gone: Sequence[VersionRemoval]
    ) -> Registered:
        """Commit all of it; `removed` also holds what the deletion of its version removed."""
        tombstones = [
            Removal(_tombstone(gone.uri, gone.object_version), gone.observed_at, gone.sequencer)
            for gone in versions_gone
        ]
        registered = self._registry.register(found, [*gone, *tombstones])
        touched = {v.uri for v in versions_gone} | {u.uri for u in found if u.object_version is not None}
        met = self._met(touched)
        if not met:
            return registered
        also = self._registry.register((), met)
        return Registered(registered.media_ids, registered.new, (*registered.removed, *also.removed))

    def _met(self, uris: Iterable[str]) -> list[Removal]:
        """Removals of the live uploads of these URIs whose version has a later tombstone."""
        wanted = sorted(uris)
        if not wanted:
            return []
        with self._engine.connect() as connection:
            rows = connection.execute(_MET, {"uris": wanted}).all()
        # A sequencer with a 0 appended sorts after itself and before every greater one.
        return [Removal(uri, observed_at, sequencer + "0") for uri, observed_at, sequencer in rows]


def _tombstone(uri: str, object_version: str) -> str:
    """Where the tombstone of a version stands among the removals; no upload has a URI of this scheme."""
    return f"version:{object_version}:{uri}"


# The tombstone must be later than the upload: version "null" of a bucket with suspended versioning comes back.
_MET = sa.text(
    """
    select u.uri, u.observed_at, u.sequencer
    from uploads u join removals r on r.uri = 'version:' || u.object_version || ':' || u.uri
    where u.uri = any(:uris) and u.state = 'live'
        and (r.observed_at, r.sequencer) > (u.observed_at, u.sequencer)
    """
)
