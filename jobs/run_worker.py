"""A warm worker: a process that works on one run after another, so that only the first one imports and loads models.

Started by the run launcher, which hands it runs over a socket: a line of JSON per run, answered by a line when
the run has ended. It ends by itself when the launcher is gone, after an hour without work by default, and
when it has grown beyond its memory or a model call hangs in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import select
import signal
import socket
from typing import Any

from resources.compute.process import may_stay

LEFT_OPEN = "The worker came back from this run without its having ended."


def main() -> None:
    """Work until the launcher hangs up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=int, required=True, help="inherited file descriptor of the launcher's socket")
    parser.add_argument("--idle", type=float, required=True, help="seconds without a run after which it ends")
    parser.add_argument("--memory", type=int, required=True, help="resident bytes above which it ends after a run")
    arguments = parser.parse_args()
    # Asked to stop between two runs it just stops; within one, Dagster ends the run first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with socket.socket(fileno=arguments.socket) as link:
            serve(link, arguments.idle, arguments.memory)
    except (KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        pass


def serve(link: socket.socket, idle_s: float, most_bytes: int) -> None:
    """Work on the runs that `link` brings, one after another."""
    with link.makefile("r") as requests:
        while True:
            if not select.select([link], [], [], idle_s)[0]:
                link.shutdown(socket.SHUT_RD)  # the launcher can hand over nothing more; what it just did is read
            line = requests.readline()
            if not line:
                return
            request = json.loads(line)
            execute(request["run_id"], request["instance"])
            gc.collect()
            stays = may_stay(most_bytes)
            link.sendall(json.dumps({"ended": request["run_id"], "stays": stays}).encode() + b"\n")
            if not stays:
                return


def execute(run_id: str, instance_ref: str) -> None:
    """Work on one run, as `dagster api execute_run` would in a process of its own."""
    from dagster import DagsterInstance

    # What Dagster's own command does; it has no public name.
    from dagster._cli.api import _execute_run_command_body
    from dagster._core.instance.ref import InstanceRef
    from dagster._serdes import deserialize_value
    from dagster._utils.interrupts import capture_interrupts

    with DagsterInstance.from_ref(deserialize_value(instance_ref, InstanceRef)) as instance, capture_interrupts():
        _execute_run_command_body(run_id, instance, _ignore, set_exit_code_on_failure=False)
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            instance.report_run_failed(run, LEFT_OPEN)


def _ignore(_: Any) -> None:
    """Events are in the instance; nobody listens to their stream."""


if __name__ == "__main__":
    main()
