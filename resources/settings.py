"""Settings: frozen, nested per subsystem, from settings.toml in the home folder and MEDIA_* variables."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as VariableError

from resources import handwritten
from resources.compute.process import usable_cpus
from resources.errors import MediaError
from resources.records import database_url

HOME_VARIABLE = "MEDIA_HOME"
FILE = "settings.toml"
_NAME = r"^[a-z][a-z0-9_]*$"
_PREFIX, _DEEPER = "MEDIA_", "__"
_NO_SETTINGS = frozenset(
    {
        "MEDIA_FAULT",
        "MEDIA_CODE_HOST",
        "MEDIA_ECS_TASK_DEFINITION",
        "MEDIA_K8S_IMAGE",
        "MEDIA_K8S_NAMESPACE",
        "MEDIA_FRESH",
        "MEDIA_TEST_FOLDER",
    }
)
"""Variables of the project that are read elsewhere: tests, deployments."""
_OF_SERVICES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?$")
"""What Kubernetes puts into every container for each service of its namespace, here for one called `media-…`."""


class BadSettings(MediaError):
    """`settings.toml` or a variable cannot be used; the message names it and what is wrong, never its value."""

    code, http_status = "bad_settings", 500
    remedy = "docs/settings.md lists the settings."


def _checked_http(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https:// and name a host")
    return url


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


def _decoders() -> int:
    return min(max(2, usable_cpus()), 8)


class Decoding(_Section):
    """What the decode group keeps of a file."""

    still_interval_s: float = Field(1.0, gt=0, description="a still at least this often, seconds")
    still_change: float = Field(12.0, gt=0, description="mean absolute 48x27 RGB change (0-255) that makes a still")
    still_max_side: int = Field(1280, gt=0, description="longest side of a video still, pixels")
    image_max_side: int = Field(2560, gt=0, description="longest side of an image's still, pixels")
    workers: int = Field(
        default_factory=_decoders, ge=1, description="decoder processes; by default one per core, 2 to 8"
    )


class Engine(_Section):
    """How the batch engine runs."""

    batch_items: int = Field(200, ge=1, description="media items per batch; of the planner's on Ray, unless set, any")
    window: int | None = Field(
        None,
        ge=1,
        description="items in flight at once; by default three micro-batches of the group's stages, at least 24",
    )
    max_units: int = Field(512, ge=1, description="model inputs held in memory at once, across items")
    prepare_threads: int = Field(
        default_factory=lambda: _decoders() + 1,
        ge=1,
        description="background threads for prepare and assemble; by default one per core and one more, 3 to 9",
    )
    max_attempts: int = Field(3, ge=1, description="attempts before an item is quarantined")
    retry_base_s: float = Field(30.0, ge=0, description="first retry delay, seconds; doubles per attempt, with jitter")
    infer_timeout_s: float = Field(
        900.0,
        gt=0,
        description="longest call of a model with one micro-batch, its loading included, and longest silence of a"
        " stage's other calls and of the checker, seconds",
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

    @field_validator("endpoint_url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        return url and _checked_http(url)


class Ingestion(_Section):
    """Where uploads come from. The sensors whose source is not set skip with that reason."""

    folders: tuple[str, ...] = Field((), description="folders that folder_sensor watches")
    follow_links: bool = Field(False, description="whether links within a folder may lead out of it")
    folder_quiet_s: float = Field(4.0, ge=0, description="a file unchanged for this long counts as written, seconds")
    # Not 0: times of files advance in steps of up to 10 ms, and a second change within one would go unseen.
    folder_closed_s: float = Field(
        0.2, ge=0.1, description="a new file unchanged for this long that nobody writes to counts as written, seconds"
    )
    folder_hold_s: float = Field(600.0, ge=0, description="wait before many files gone at once are believed, seconds")
    queue_url: str | None = Field(None, description="SQS queue fed by S3 event notifications")
    dead_letter_url: str | None = Field(None, description="SQS queue for messages that cannot be understood")
    queue_endpoint_url: str | None = Field(None, description="endpoint of an SQS-compatible service; default: AWS")
    max_messages_per_tick: int = Field(20_000, ge=1, description="SQS messages one tick takes at most")
    prefixes: tuple[str, ...] = Field((), description="s3://bucket/prefix locations that s3_inventory_sensor lists")
    inventory_every_s: float = Field(3600.0, ge=0, description="pause between two full listings of a prefix, seconds")
    inventory_page: int = Field(1000, ge=1, le=1000, description="keys per page of a listing")
    tick_budget_s: float = Field(25.0, gt=0, lt=55, description="wall time of one tick; Dagster ends it at 60, seconds")

    @field_validator("queue_endpoint_url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        return url and _checked_http(url)

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
    interval_s: int = Field(5, ge=1, description="pause between two ticks of planner_sensor, seconds")
    max_in_flight: int = Field(2, ge=1, description="batches in flight per group; the rest waits in the registry")
    lookahead: int = Field(5_000, ge=1, description="unsettled items one tick looks at")
    batch_seconds: float = Field(900.0, gt=0, description="expected seconds of work at which a batch is full")
    long_s: float = Field(120.0, gt=0, description="expected seconds from which an item rides with long ones only")
    express_s: float = Field(
        60.0,
        ge=0,
        description="expected work up to which all groups share a run on an idle system, seconds; 0: never; on Ray,"
        " unless set, 300",
    )
    max_wait_s: float = Field(60.0, ge=0, description="longest wait of an item for its batch to fill, seconds")
    price_per_hour: float = Field(0.0, ge=0, description="price of an hour of one run, in your currency, for estimates")
    lost_after_s: float = Field(600.0, gt=0, description="a requested batch without a run is given up after, seconds")


class GroupNeeds(_Section):
    """What the steps of one group ask for, where it differs from what the group states itself."""

    stages: tuple[str, ...] = Field((), description="assets split off from their group into this new one")
    cpus: float | None = Field(None, gt=0, description="CPU cores")
    gpus: float | None = Field(None, ge=0, description="GPUs: a whole number, or a fraction of one")
    memory_bytes: int | None = Field(None, ge=2**20, description="memory, bytes")
    gpu_memory_bytes: int | None = Field(None, ge=0, description="memory of each GPU, bytes; 0: whatever it has")
    gpu_required: bool | None = Field(None, description="whether a run without a GPU is refused, not run on the CPU")
    pool: str | None = Field(None, pattern=_NAME, description="concurrency pool; default: gpu with GPUs, else cpu")

    @field_validator("gpus")
    @classmethod
    def _whole_or_part(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a fraction of one GPU or a whole number of them")
        return gpus


class Compute(_Section):
    """Where runs are executed, and what their groups ask for."""

    executor: Literal["local", "ray", "ecs", "k8s"] = Field("local", description="what executes runs")
    groups: dict[str, GroupNeeds] = Field({}, description="needs by group; a name that is new splits stages off")
    ecs_gpu_task_definition: str = Field("media-assets-gpu", description="ECS task definition of runs with a GPU")
    ecs_gpu_capacity_provider: str = Field("media-assets-gpu", description="ECS capacity provider of runs with a GPU")
    k8s_gpu_node_selector: dict[str, str] = Field(
        {"nvidia.com/gpu.present": "true"}, description="labels of the Kubernetes nodes that have GPUs"
    )

    @field_validator("groups")
    @classmethod
    def _named(cls, groups: dict[str, GroupNeeds]) -> dict[str, GroupNeeds]:
        if wrong := [name for name in groups if not re.fullmatch(_NAME, name)]:
            raise ValueError(f"a group is called by a-z, 0-9 and _, not {wrong[0]!r}")
        return groups


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
        if url:
            _checked_http(url.get_secret_value())
        return url


class Retention(_Section):
    """How long Dagster's account of the past is kept; that of ticks is set in dagster.yaml."""

    runs_days: float = Field(
        90.0, ge=0, description="age at which finished runs that nothing shown depends on are deleted, days; 0: never"
    )
    logs_days: float = Field(
        14.0, ge=0, description="age at which captured logs of runs and ticks are deleted, days; 0: never"
    )


class Ray(_Section):
    """The Ray cluster that runs and models may use."""

    address: str | None = Field(
        None,
        description="host:port of the cluster's GCS, or ray://host:port, or for steps alone http://host:port of its job"
        " server; default: RAY_ADDRESS, then this machine's",
    )
    connect_timeout_s: float = Field(10.0, gt=0, description="time a cluster has to answer, seconds")


class Serving(_Section):
    """Where `infer` runs: in the run's own process, or in model servers on Ray that stay up between runs."""

    backend: Literal["local", "ray"] = Field("local", description="`local`: in the run's process; `ray`: warm models")
    cpus: float = Field(1.0, ge=0, description="CPU cores of a model server, as Ray counts them")
    gpus: float = Field(0.0, ge=0, description="GPUs of a model server; with a fraction, models share a device")
    max_wait_ms: float = Field(
        5.0, ge=0, description="longest wait of a unit for its micro-batch to fill, milliseconds"
    )
    timeout_s: float = Field(120.0, gt=0, description="longest a model may take over a micro-batch, seconds")
    load_timeout_s: float = Field(600.0, gt=0, description="longest a model may take to be placed and loaded, seconds")
    health_s: float = Field(15.0, gt=0, description="a silent server must give a sign of life this often, seconds")
    idle_s: float = Field(900.0, gt=0, description="a model without calls for this long is unloaded, seconds")
    memory_bytes: int | None = Field(
        None, gt=0, description="memory all warm models may hold, bytes; default: what the cluster has"
    )
    fallback: Literal["none", "local"] = Field(
        "none", description="when a server fails or times out: `none`: the items fail; `local`: this process answers"
    )


class Settings(BaseSettings):
    """All settings of one installation.

    Read in order: constructor arguments, variables `MEDIA_<SECTION>__<FIELD>` (for example
    `MEDIA_LIMITS__MAX_PIXELS`), `settings.toml` in the home folder, defaults. Unknown keys raise.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # some of them are passwords
        env_prefix=_PREFIX,
        env_nested_delimiter=_DEEPER,
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
    retention: Retention = Retention()
    compute: Compute = Compute()
    ray: Ray = Ray()
    serving: Serving = Serving()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then <home>/settings.toml. Raises BadSettings where that cannot be read."""
        home = Path(init_settings().get("home") or os.environ.get(HOME_VARIABLE) or "var")
        return init_settings, env_settings, InitSettingsSource(settings_cls, _written(home / FILE))

    @classmethod
    def load(cls, home: Path | str | None = None) -> Self:
        """Settings of `home` (default: $MEDIA_HOME, then ./var), with the home made absolute. Raises BadSettings."""
        chosen = Path(home or os.environ.get(HOME_VARIABLE) or "var").absolute()
        _refuse_misspelt(cls)
        try:
            return cls(home=chosen)
        except ValidationError as error:
            raise BadSettings(f"Wrong settings: {'; '.join(_told(error, chosen / FILE))}.") from error
        except VariableError as error:
            raise BadSettings(_not_json(str(error))) from error

    @field_validator("database_url")
    @classmethod
    def _postgres(cls, url: str | None) -> str | None:
        if url:
            database_url.check(url)
        return url

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        is_chosen = "prepare_threads" in self.engine.model_fields_set  # else it follows the cores
        window = self.engine.window
        if is_chosen and window is not None and window < self.engine.prepare_threads:
            raise ValueError("engine.window must be at least engine.prepare_threads, or threads would idle")
        queue = self.ingestion.queue_url
        if queue is not None and queue == self.ingestion.dead_letter_url:
            raise ValueError("ingestion.dead_letter_url must name another queue than ingestion.queue_url")
        if self.profile == "offline" and any(needs.gpu_required for needs in self.compute.groups.values()):
            raise ValueError('gpu_required contradicts profile = "offline", whose models run on the CPU')
        if self.profile == "gpu" and self.serving.backend == "ray" and not self.serving.gpus:
            raise ValueError("serving.gpus must be above 0 with profile gpu: Ray hides the devices from other actors")
        return self


def variables(model: type[BaseModel], prefix: str = _PREFIX) -> set[str]:
    """Names of the variables that set something of `model`, those of its sections included."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        names.add(variable)
        if section := _section_of(field.annotation):
            names |= variables(section, variable + _DEEPER)
    return names


def _refuse_misspelt(model: type[BaseModel]) -> None:
    """pydantic looks for the variables it knows; one that nobody reads would be taken for a setting."""
    known = variables(model)
    for name in sorted(os.environ):
        variable = name.upper()
        first, _, deeper = variable.removeprefix(_PREFIX).partition(_DEEPER)
        if not variable.startswith(_PREFIX) or not os.environ[name] or variable in known | _NO_SETTINGS:
            continue
        field = model.model_fields.get(first.lower())
        is_section = field is not None and bool(_section_of(field.annotation))
        if (is_section and deeper) or _OF_SERVICES.search(variable):  # what is in a section, pydantic checks
            continue
        nearest = get_close_matches(variable, sorted(known), 1, 0.0)
        raise BadSettings(f"{name} is no setting; the nearest is {nearest[0]}.")


def _section_of(annotation: object) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _written(path: Path) -> dict[str, Any]:
    """What settings.toml says; nothing where there is none. Raises BadSettings."""
    try:
        return handwritten.read_toml(path)
    except (FileNotFoundError, NotADirectoryError):  # a home that cannot be made is told when something is kept in it
        return {}
    except (OSError, ValueError) as error:
        raise BadSettings(f"{path} cannot be used: {handwritten.reason(error)}.", "Mend or remove it.") from error


def _told(error: ValidationError, path: Path) -> list[str]:
    """Each problem, with the variable or the file that it comes from."""
    places = [_place([str(part) for part in found["loc"]], path) for found in error.errors(include_input=False)]
    return [f"{told} ({place})" for told, place in zip(handwritten.problems(error), places, strict=True)]


def _place(setting: list[str], path: Path) -> str:
    """Where a setting was set: variables win over the file; a contradiction may come from either."""
    given = {name.upper(): name for name in os.environ}
    for length in range(len(setting), 0, -1):
        if name := given.get(_PREFIX + _DEEPER.join(setting[:length]).upper()):
            return f"variable {name}"
    return f"in {path}" if setting else f"in {path} or the {_PREFIX}… variables"


def _not_json(said: str) -> str:
    """A variable of a list or a section that is no JSON: the library names the setting alone."""
    named = re.search(r'field "(\w+)"', said)
    start = _PREFIX + (named[1].upper() if named else "")
    given = sorted(name for name in os.environ if name.upper().startswith(start))
    return f"The value of {' or '.join(given)} is not the JSON that its setting needs."
