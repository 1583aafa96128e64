"""Settings: frozen, nested per subsystem, from settings.toml in the home folder and MEDIA_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

HOME_VARIABLE = "MEDIA_HOME"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    previews_per_run: int = Field(200, ge=0, description="items per run and asset whose picture goes to the Dagster UI")


class Index(_Section):
    """Buckets, shards and the catalog."""

    buckets: int = Field(4, ge=1, description="number of catalog and index buckets; fixed once data exists")
    min_recall: float = Field(0.95, ge=0, le=1, description="recall@10 a new shard needs against exact search")


class Settings(BaseSettings):
    """All settings of one installation.

    Read in order: constructor arguments, variables `MEDIA_<SECTION>__<FIELD>` (for example
    `MEDIA_LIMITS__MAX_PIXELS`), `settings.toml` in the home folder, defaults. Unknown keys raise.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="MEDIA_", env_nested_delimiter="__", env_ignore_empty=True
    )

    home: Path = Field(Path("var"), description="folder that holds all state")
    storage_url: str | None = Field(None, description="fsspec URL for derived files; default <home>/derived")
    database_url: str | None = Field(None, description="Postgres URL; default: an embedded server in <home>/postgres")
    profile: Literal["offline", "gpu"] = Field("offline", description="section of models.toml to use")
    golden: str | None = Field(None, description="folder with a golden set; default: the shipped samples")
    limits: Limits = Limits()
    decoding: Decoding = Decoding()
    engine: Engine = Engine()
    index: Index = Index()

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
        return self
