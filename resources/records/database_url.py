"""The URL of the database: PostgreSQL by psycopg2. What is wrong with one is said without its password."""

from __future__ import annotations

EXAMPLE = "postgresql://user:password@host:5432/name"
_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2")
_HIGHEST_PORT = 65535


def psycopg2_url(url: str) -> str:
    """`url` with the driver named: a bare postgresql:// would mean psycopg 3 to SQLAlchemy 2.1."""
    scheme, rest = url.split("://", 1)
    return f"postgresql+psycopg2://{rest}" if scheme in ("postgres", "postgresql") else url


def check(url: str) -> None:
    """Raises ValueError, in words that hold no part of the URL but its scheme, where no connection could be tried."""
    import psycopg2  # type: ignore[import-untyped]
    import sqlalchemy as sa
    from sqlalchemy.dialects.postgresql.psycopg2 import dialect

    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ValueError(f"must be a URL such as {EXAMPLE}")
    if scheme not in _SCHEMES:
        raise ValueError(f"must begin with postgresql://, not {scheme}://, such as {EXAMPLE}")
    try:
        parsed = sa.make_url(psycopg2_url(url))
    except ValueError:  # the port is no number
        parsed = None
    except sa.exc.ArgumentError:
        raise ValueError(f"must be a URL such as {EXAMPLE}") from None
    if parsed is None or (parsed.port is not None and not 0 < parsed.port <= _HIGHEST_PORT):
        raise ValueError(
            f"has a port that is no number from 1 to {_HIGHEST_PORT};"
            " in user and password, a colon is written %3A, a slash %2F and an @ %40"
        )
    if "@" in (parsed.host or ""):
        raise ValueError("has more than one @; in user and password, it is written %40")
    try:
        arguments, options = dialect().create_connect_args(parsed)  # type: ignore[no-untyped-call]
        psycopg2.extensions.make_dsn(*arguments, **options)
    except (psycopg2.Error, sa.exc.ArgumentError, TypeError, ValueError):
        raise ValueError("has an option after its ? that PostgreSQL does not know") from None
