"""`media-assets dev`: Dagster UI and daemon over the library's instance, on loopback, until interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from cli.exit_codes import Exit
from cli.instance import PROJECT, limit_pools, prepare_environment
from cli.text import WHOLE, shown
from resources.ingest.uploads import uri_of
from resources.library import Library

HOST = "127.0.0.1"
FOLDERS_VARIABLE = "MEDIA_INGESTION__FOLDERS"
_DEV_LOCK = -1  # within the project's advisory locks
_STOP_S = 30.0
_POLL_S = 0.1
# Dagster advises another project layout on every start; this one is launched by its own command.
_QUIET = {"PYTHONWARNINGS": "ignore:Function `dev_command` is superseded"}


def serve(library: Library, port: int, console: Console, folders: Sequence[Path] = ()) -> int:
    """Run `dagster dev` until it ends or a signal arrives; the embedded Postgres lives as long.

    `folders` are watched besides those of the settings.
    """
    # SIGINT as well: a shell starts background jobs with it ignored, Dagster would inherit that and never stop.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.default_int_handler)
    if not _is_free(port):
        console.print(f"Port {port} is in use. Choose another with --port.", style="red")
        return Exit.USAGE
    try:
        console.print("starting Postgres", style="dim")
        with library.database.exclusive(_DEV_LOCK) as alone:
            if not alone:  # two daemons would launch everything twice
                console.print("Another `media-assets dev` runs on this home. Use its UI, or stop it.", style="red")
                return Exit.USAGE
            folder = prepare_environment(library)
            limit_pools(library)
            _watch(library, folders, console)
            console.print(f"Dagster UI: http://{HOST}:{port} once it says “Serving” below; Ctrl-C stops everything.")
            return _run(port, folder)
    finally:
        library.close()


def _watch(library: Library, folders: Sequence[Path], console: Console) -> None:
    """Set what the child's folder sensor watches, and say it."""
    # A URI where a name is not UTF-8: the variable is JSON.
    watched = dict.fromkeys([*library.settings.ingestion.folders, *(uri_of(folder) for folder in folders)])
    if not watched:
        console.print("No folder is watched. To have new files processed by themselves: media-assets dev FOLDER")
        return
    os.environ[FOLDERS_VARIABLE] = json.dumps(list(watched))
    names = ", ".join(shown(folder, WHOLE) for folder in watched)
    console.print(f"Watching {names}: files that come, change or go are registered.")


def _run(port: int, folder: Path) -> int:
    workspace = str(PROJECT / "workspace.yaml")
    command = [sys.executable, "-m", "dagster", "dev", "-h", HOST, "-p", str(port), "-w", workspace]
    # A session of its own: Ctrl-C reaches this process alone, which then stops the others in order.
    child = subprocess.Popen(command, env={**os.environ, **_QUIET}, cwd=folder, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return Exit.OK
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt Dagster, wait for it and for the runs it launched, and kill what is left then."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline:
        child.poll()  # reaps it, or its group would never be empty
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(_POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
