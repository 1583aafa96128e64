"""A small disk that can be full, or gone for a while: a tmpfs in a mount namespace of this process. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INSIDE = "MEDIA_BENCHMARK_NAMESPACE"
PIECE = 1 << 20


def enter_namespace(module: str) -> None:
    """Run this program again in a mount namespace of its own, unless it does already. Root alone may."""
    if os.geteuid() == 0 and INSIDE not in os.environ:
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", module, *sys.argv[1:]]
        os.execvpe(command[0], command, {**os.environ, INSIDE: "1"})


class BadDisk:
    """A disk of `size_mb` megabytes, used at `path`; while it is gone, there is an empty place nobody can write to."""

    def __init__(self, folder: Path, size_mb: int) -> None:
        self._disk, self.path = folder / "device", folder / "disk"
        for place, options in ((self._disk, f"size={size_mb}m,mode=755"), (self.path, "size=4k,ro")):
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "bad_disk", str(place)], check=True)
        self._is_there = False
        self.come_back()

    def fill(self) -> None:
        """Leave no room."""
        try:
            with (self._disk / "ballast").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(PIECE))
        except OSError:
            return

    def empty(self) -> None:
        """Give the room back."""
        (self._disk / "ballast").unlink(missing_ok=True)

    def vanish(self) -> None:
        """Take the disk away, also from under who uses it."""
        if self._is_there:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)
            self._is_there = False

    def come_back(self) -> None:
        """Have it there again."""
        if not self._is_there:
            subprocess.run(["mount", "--bind", str(self._disk), str(self.path)], check=True)
            self._is_there = True

    def close(self) -> None:
        """Unmount everything."""
        self.vanish()
        for place in (self.path, self._disk):
            subprocess.run(["umount", "--lazy", str(place)], check=False)
