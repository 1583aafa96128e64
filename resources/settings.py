"""Settings: frozen, nested per subsystem, from settings.toml in the home folder and MEDIA_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

HOME_VARIABLE = "MEDIA_HOME"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Limits(_Section):
    """What one file may cost before it is refused; safe defaults for untrusted uploads."""

    max_bytes: int = Field(20 * 2**30, gt=0, description="largest file accepted, bytes")
    max_pixels: int = Field(120_000_000, gt=0, description="largest picture or video frame, width x height")
    max_duration_s: float = Field(6 * 3600.0, gt=0, description="longest audio or video, seconds")
    max_text_bytes: int = Field(20 * 2**20, gt=0, description="largest text document, bytes")
    decode_timeout_s: float = Field(60.0, gt=0, description="wall time a decode may take without progress, seconds")
    decode_factor: float = Field(2.0, gt=0, description="extra wall time per second of media, seconds per second")
    decode_memory_bytes: int = Field(4 * 2**30, gt=0, description="address space of one decoder process, bytes")


class Decoding(_Section):
    """What the decode group keeps of a file."""

    still_interval_s: float = Field(1.0, gt=0, description="a still at least this often, seconds")
    still_change: float = Field(12.0, gt=0, description="mean absolute 48x27 RGB change (0-255) that makes a still")
    still_max_side: int = Field(1280, gt=0, description="longest side of a video still, pixels")
    image_max_side: int = Field(2560, gt=0, description="longest side of an image's still, pixels")
    workers: int = Field(2, ge=1, description="decoder processes")


class Engine(_Section):
    """How the batch engine runs."""

    batch_items: int = Field(200, ge=1, description="media items per batch")
    window: int = Field(24, ge=1, description="items in flight at once")
    max_units: int = Field(512, ge=1, description="model inputs held in memory at once, across items")
    prepare_threads: int = Field(2, ge=1, description="background threads for prepare and assemble")
    max_attempts: int = Field(3, ge=1, description="attempts before an item is quarantined")
    retry_base_s: float = Field(30.0, ge=0, description="first retry delay, seconds; doubles per attempt, with jitter")
    infer_timeout_s: float = Field(
        900.0, gt=0, description="longest call of a model with one micro-batch, its loading included, seconds"
    )
    previews_per_run: int = Field(200, ge=0, description="items per run and asset whose picture goes to the Dagster UI")


class Index(_Section):
    """Buckets, shards and the catalog."""

    buckets: int = Field(4, ge=1, description="number of catalog and index buckets; fixed once data exists")
    min_recall: float = Field(0.95, ge=0, le=1, description="recall@10 a new shard needs against exact search")


class S3(_Section):
    """How S3, and any store that speaks its protocol, is reached. Credentials come from AWS' own chain."""

    endpoint_url: str | None = Field(None, description="endpoint of an S3-compatible store; default: AWS")
    region: str | None = Field(None, description="AWS region; default: AWS' own configuration")
    max_attempts: int = Field(5, ge=1, description="attempts of one request, with AWS' adaptive back-off")
    connect_timeout_s: float = Field(5.0, gt=0, description="time to connect, seconds")
    read_timeout_s: float = Field(60.0, gt=0, description="time between two bytes of an answer, seconds")
    part_bytes: int = Field(16 * 2**20, ge=5 * 2**20, description="bytes per part of an upload of two parts or more")
    block_bytes: int = Field(4 * 2**20, ge=2**16, description="bytes fetched per ranged read of a media file")
    copy_bytes: int = Field(
        512 * 2**20,
        ge=0,
        description="largest object copied to a temporary file for decoding; larger ones are streamed",
    )
    checksums: Literal["when_supported", "when_required"] = Field(
        "when_supported", description="CRC32 with every request; when_required for stores that refuse it"
    )


class Ingestion(_Section):
    """Where uploads come from. The sensors whose source is not set skip with that reason."""

    folders: tuple[str, ...] = Field((), description="folders that folder_sensor watches")
    folder_quiet_s: float = Field(5.0, ge=0, description="a file unchanged for this long counts as written, seconds")
    folder_hold_s: float = Field(600.0, ge=0, description="wait before many files gone at once are believed, seconds")
    queue_url: str | None = Field(None, description="SQS queue fed by S3 event notifications")
    dead_letter_url: str | None = Field(None, description="SQS queue for messages that cannot be understood")
    queue_endpoint_url: str | None = Field(None, description="endpoint of an SQS-compatible service; default: AWS")
    max_messages_per_tick: int = Field(20_000, ge=1, description="SQS messages one tick takes at most")
    prefixes: tuple[str, ...] = Field((), description="s3://bucket/prefix locations that s3_inventory_sensor lists")
    inventory_every_s: float = Field(3600.0, ge=0, description="pause between two full listings of a prefix, seconds")
    inventory_page: int = Field(1000, ge=1, le=1000, description="keys per page of a listing")
    tick_budget_s: float = Field(25.0, gt=0, lt=55, description="wall time of one tick; Dagster ends it at 60, seconds")

    @field_validator("folders")
    @classmethod
    def _absolute(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [folder for folder in folders if not folder.startswith(("/", "file:///"))]:
            raise ValueError(f"not an absolute path: {', '.join(wrong)}")
        return folders

    @field_validator("prefixes")
    @classmethod
    def _on_s3(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            bucket = prefix.removeprefix("s3://").partition("/")[0]
            if not prefix.startswith("s3://") or not bucket:
                raise ValueError(f"ingestion.prefixes must look like s3://bucket/prefix, not {prefix!r}")
        return prefixes


class Planner(_Section):
    """How pending work becomes runs."""

    enabled: bool = Field(True, description="whether planner_sensor runs from the start; the UI can switch it too")
    interval_s: int = Field(10, ge=1, description="pause between two ticks of planner_sensor, seconds")
    max_in_flight: int = Field(2, ge=1, description="batches in flight per group; the rest waits in the registry")
    lookahead: int = Field(5_000, ge=1, description="unsettled items one tick looks at")
    batch_seconds: float = Field(900.0, gt=0, description="expected seconds of work at which a batch is full")
    long_s: float = Field(120.0, gt=0, description="expected seconds from which an item rides with long ones only")
    max_wait_s: float = Field(60.0, ge=0, description="longest wait of an item for its batch to fill, seconds")
    price_per_hour: float = Field(0.0, ge=0, description="price of an hour of one run, in your currency, for estimates")
    lost_after_s: float = Field(600.0, gt=0, description="a requested batch without a run is given up after, seconds")


class Alerts(_Section):
    """Where failures are posted."""

    webhook_url: SecretStr | None = Field(None, description="http(s) URL that failures are posted to; default: none")
    format: Literal["json", "slack"] = Field("json", description="body: generic JSON, or Slack's `text`")
    min_interval_s: float = Field(
        60.0, ge=0, description="pause between two posts, seconds; failures within it are joined"
    )
    timeout_s: float = Field(10.0, gt=0, le=30, description="time the receiver has to answer, seconds")

    @field_validator("webhook_url")
    @classmethod
    def _http(cls, url: SecretStr | None) -> SecretStr | None:
        parts = urlsplit(url.get_secret_value()) if url else None
        if parts and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("must begin with http:// or https:// and name a host")
        return url


class Settings(BaseSettings):
    """All settings of one installation.

    Read in order: constructor arguments, variables `MEDIA_<SECTION>__<FIELD>` (for example
    `MEDIA_LIMITS__MAX_PIXELS`), `settings.toml` in the home folder, defaults. Unknown keys raise.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # some of them are passwords
        env_prefix="MEDIA_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    home: Path = Field(Path("var"), description="folder that holds all state")
    storage_url: str | None = Field(None, description="fsspec URL for derived files; default <home>/derived")
    database_url: str | None = Field(None, description="Postgres URL; default: an embedded server in <home>/postgres")
    profile: Literal["offline", "gpu"] = Field("offline", description="section of models.toml to use")
    partitions: Literal["media", "bucket"] = Field(
        "media", description="what a Dagster partition is: a media item (up to about 100,000), or a bucket of them"
    )
    golden: str | None = Field(None, description="folder with a golden set; default: the shipped samples")
    limits: Limits = Limits()
    decoding: Decoding = Decoding()
    engine: Engine = Engine()
    index: Index = Index()
    s3: S3 = S3()
    ingestion: Ingestion = Ingestion()
    planner: Planner = Planner()
    alerts: Alerts = Alerts()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then <home>/settings.toml."""
        home = Path(init_settings().get("home") or os.environ.get(HOME_VARIABLE) or "var")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, home / "settings.toml")

    @classmethod
    def load(cls, home: Path | str | None = None) -> Self:
        """Settings of `home` (default: $MEDIA_HOME, then ./var), with the home made absolute."""
        chosen = Path(home or os.environ.get(HOME_VARIABLE) or "var").absolute()
        return cls(home=chosen)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine.window < self.engine.prepare_threads:
            raise ValueError("engine.window must be at least engine.prepare_threads, or threads would idle")
        queue = self.ingestion.queue_url
        if queue is not None and queue == self.ingestion.dead_letter_url:
            raise ValueError("ingestion.dead_letter_url must name another queue than ingestion.queue_url")
        return self
