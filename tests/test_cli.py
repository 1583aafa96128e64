"""The command line itself: help that teaches, documented commands, a fast and light start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from cli.main import app, warn_root
from cli.report import next_commands

PROJECT = Path(__file__).parents[1]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)
HEAVY = ("torch", "transformers", "whisperx", "easyocr", "faiss", "great_expectations", "cv2", "onnxruntime")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    return done.stdout


def test_every_command_has_help_and_stands_in_the_docs() -> None:
    """Given the commands, then each explains itself and is described in the reference."""
    group = typer.main.get_command(app)
    reference = (PROJECT / "docs" / "command-line.md").read_text()
    for name in COMMANDS:
        assert (group.commands[name].help or "").strip(), name  # type: ignore[attr-defined]
        assert f"`media-assets {name}" in reference, name


def test_help_imports_nothing_heavy() -> None:
    """Given `--help`, then neither Dagster nor any model or data library is loaded."""
    code = (
        "import sys; from cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    loaded = python(code).splitlines()[-1]
    for name in (*HEAVY, "dagster", "pyarrow", "pandas", "sqlalchemy", "numpy", "pydantic"):
        assert f"'{name}'" not in loaded, name


def test_definitions_load_without_the_model_libraries(tmp_path: Path) -> None:
    """Given the code location, then loading it imports no model library and starts no database."""
    code = (
        f"import os, sys; os.environ['MEDIA_HOME'] = {str(tmp_path / 'home')!r}\n"
        "from media_assets.definitions import defs; defs()\n"
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    loaded = python(code).splitlines()[-1]
    for name in HEAVY:
        assert f"'{name}'" not in loaded, name
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[limits]\nmax_pixel = 1\n", "limits.max_pixel"),
        ("[engine]\nwindow = 1\nprepare_threads = 4\n", "threads would idle"),
        ("[engine]\nwindow = 0\n", "engine.window"),
    ],
)
def test_wrong_settings_are_refused_with_their_name(tmp_path: Path, toml: str, said: str) -> None:
    """Given a settings file with a mistake, then every command exits 7 and names it."""
    (tmp_path / "settings.toml").write_text(toml)
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "status", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 7
    assert said in done.stderr


def test_a_misspelt_variable_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Given a variable that is no setting, then a command exits 7 and says which is meant."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "status", "--home", str(tmp_path)],
        env={**os.environ, "MEDIA_PROFIL": "gpu"},
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 7
    assert done.stderr == (
        "MEDIA_PROFIL is no setting; the nearest is MEDIA_PROFILE. docs/settings.md lists the settings.\n"
    )


def test_an_unknown_asset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    """Given `--select` with a typo, then usage exits 2 and lists the assets."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "run", "--select", "transcripts", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 2
    assert "moderation_labels" in done.stderr


def test_what_run_proposes_can_be_pasted() -> None:
    """Given a home whose path means something to a shell, then each command proposed after a run names it whole."""
    home = "/media/Bücher & Filme/it's $HOME/" + "x" * 200
    commands = [shlex.split(command) for command, _ in next_commands(home)]
    assert {command[0] for command in commands} == {"media-assets"}
    assert [command[-2:] for command in commands] == [["--home", home]] * 4
    assert {command[1] for command in commands} <= set(COMMANDS)


@pytest.mark.parametrize(("user", "is_warned"), [(0, True), (1000, False)])
def test_root_is_warned(
    user: int, is_warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given root, then what a hostile file could read is said; given another user, then nothing is."""
    monkeypatch.setattr("os.geteuid", lambda: user)
    warn_root(Console(stderr=True))
    assert ("Running as root" in capsys.readouterr().err) is is_warned
