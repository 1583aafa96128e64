"""Whether anybody still writes to a file, as the kernel of this machine knows it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys

_LOCAL = {
    0xEF53: "ext2, ext3, ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
    0x2FC12FC1: "zfs",
}
"""File systems, by their number in statfs(2), whose writers this kernel all knows; those of a network's or FUSE's may
be elsewhere, and some of these give leases too."""
_STATFS_BYTES = 512  # several times the structure's size on any platform
_C_LIBRARY = ctypes.CDLL(None)


def stat_if_closed(path: str) -> os.stat_result | None:
    """What `os.stat` says of the regular file at `path`, links followed, if nobody has it open for writing.

    None when somebody has, a shared writable mapping included, and when it cannot be told: not Linux, not a local
    file system, neither the owner's process nor one with CAP_LEASE, or no such file. Never raises OSError.

    The kernel gives a read lease only on a file without writers; it is given back at once. Who opens the file for
    writing or truncates it meanwhile waits until then, with O_NONBLOCK gets EWOULDBLOCK. Not seen are writers that
    come back: a program that opens and closes for each piece, a client of an NFS server on this machine.
    """
    if sys.platform != "linux" or not _is_local(path):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # another's write lease is not waited for
    except OSError:
        return None
    try:
        # First of all: who breaks a lease sends its holder SIGIO, which ends the process, unless another is chosen.
        # SIGURG is ignored by default and, unlike a real-time signal, never replaced by SIGIO when queues are full.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return os.fstat(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _is_local(path: str) -> bool:
    """Asked before the file is opened, which alone may fetch it from far away."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _C_LIBRARY.statfs(os.fsencode(path), answer) != 0:
        return False
    number = ctypes.c_long.from_buffer(answer).value  # the first field, a word on all but s390, where none is known
    return number & 0xFFFFFFFF in _LOCAL
