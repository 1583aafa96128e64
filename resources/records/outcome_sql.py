"""The statements by which outcome records change many at a time."""

from __future__ import annotations

import sqlalchemy as sa

from resources.records.outcome import Cost, Outcome

HISTORY = ("media_id", "asset", "version", "claim", "status", "error_class", "error", "run_id")
"""Columns of a record that are kept in its history."""
# First claims of outcomes, by far the most frequent, in one round trip; any other finds a row in its way.
CLAIM_FIRST = sa.text(
    """
    with wanted as (
        select * from unnest(cast(:media_ids as text[]), cast(:assets as text[]), cast(:versions as text[]))
            as w(media_id, asset, version)
    ), held as materialized (
        select media_id from uploads where media_id in (select media_id from wanted) and state = 'live'
        order by media_id for no key update
    ), made as (
        insert into outcomes (media_id, asset, version, status, attempts, claim, run_id)
        select media_id, asset, version, 'running', 1, 1, :run_id
        from wanted where media_id in (select media_id from held)
            or not exists (select from uploads where uploads.media_id = wanted.media_id)
        order by media_id, asset
        on conflict do nothing
        returning media_id, asset, version, claim, status, run_id
    ), noted as (
        insert into outcome_history (media_id, asset, version, claim, status, run_id) select * from made
    ), unsettled as (
        update uploads set plan = null where plan is not null and media_id in (select media_id from made)
    )
    select media_id, asset, (
        select min(o.media_id) from outcomes o where o.asset = made.asset and o.version = made.version
            and o.status = 'ok'
    ) as twin from made
    """
)
TWIN = sa.text("select min(media_id) from outcomes where asset = :asset and version = :version and status = 'ok'")
# The record and its history are one transaction and one round trip.
END = sa.text(
    f"""
    with given as (
        select * from jsonb_to_recordset(cast(:endings as jsonb)) as g(
            media_id text, asset text, version text, claim bigint, status text, content text, attempts int,
            error_class text, error text, retry_s float8, costs boolean, seconds float8, units int, rows bigint,
            device text, model text, bytes_out bigint, copied_from text)
    ), held as materialized (
        -- By key, from arrays whose length the planner knows: the index of states is full of rows that left theirs.
        select o.media_id, o.asset, o.version, o.claim, o.status
        from unnest(cast(:media_ids as text[]), cast(:assets as text[])) as k(media_id, asset)
        join outcomes o using (media_id, asset) order by o.media_id, o.asset for no key update of o
    ), written as (
        update outcomes o set
            status = g.status, content = coalesce(g.content, o.content), attempts = coalesce(g.attempts, o.attempts),
            error_class = g.error_class, error = g.error, retry_at = now() + make_interval(secs => g.retry_s),
            {", ".join(f"{name} = case when g.costs then g.{name} else o.{name} end" for name in Cost.__slots__)},
            updated_at = now()
        from given g join held h using (media_id, asset, version, claim)
        where o.media_id = h.media_id and o.asset = h.asset and h.status = 'running'
            and not exists (select from uploads u where u.media_id = h.media_id and u.state = 'purged')
        returning {", ".join(f"o.{name}" for name in Outcome.__slots__)}
    ), noted as (
        insert into outcome_history ({", ".join(HISTORY)}) select {", ".join(HISTORY)} from written
    )
    select * from written
    """  # noqa: S608 - names of columns, of this module
)
