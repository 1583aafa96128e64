"""`media-assets dev`: Dagster UI and daemon over the library's instance, on loopback, until interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from rich.console import Console

from cli.exit_codes import Exit
from cli.instance import PROJECT, prepare_environment
from resources.library import Library

HOST = "127.0.0.1"
_STOP_S = 30


def serve(library: Library, port: int, console: Console) -> int:
    """Run `dagster dev` until it ends or a signal arrives; the embedded Postgres lives as long."""
    if not _is_free(port):
        console.print(f"Port {port} is in use. Choose another with --port.", style="red")
        return Exit.USAGE
    console.print("starting Postgres", style="dim")
    prepare_environment(library)
    workspace = str(PROJECT / "workspace.yaml")
    command = [sys.executable, "-m", "dagster", "dev", "-h", HOST, "-p", str(port), "-w", workspace]
    console.print(f"Dagster UI: http://{HOST}:{port} (ready when it says so below; Ctrl-C stops everything)")
    child = subprocess.Popen(command, env=os.environ, start_new_session=True)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: child.send_signal(signal.SIGINT))
    try:
        return child.wait()
    finally:
        _stop(child)
        library.close()


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
