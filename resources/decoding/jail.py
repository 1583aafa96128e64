"""What a decoder process may not do, told to the kernel: no sockets, programs, children, or changes to any file.

A call that decoding never makes kills the process with SIGSYS, so that the file's outcome says so. Linux on x86-64 and
64-bit ARM; elsewhere `confine` sets the limits alone. Filters: seccomp(2), in the classic BPF of <linux/filter.h>.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence

MOST_OPEN_FILES = 64
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_SET_SECCOMP = 38, 24, 22
SECCOMP_MODE_FILTER = 2
KILL, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
ENOSYS = 38
# Offsets in struct seccomp_data; of an argument, its lower 32 bits on a little-endian machine.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
X32_BIT = 0x40000000
CLONE_THREAD = 0x00010000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
_KEPT_BY_ROOT = (1 << CAP_DAC_OVERRIDE) | (1 << CAP_DAC_READ_SEARCH)  # to read files of others; writing is closed
_CAPABILITY_VERSION = 0x20080522

Rule = tuple[int, int, int, int]
"""An instruction: its code, how many to skip where it holds and where not, and its operand."""

# Number on x86-64 and on 64-bit ARM; None where there is no such call.
FORBIDDEN: Mapping[str, tuple[int | None, int | None]] = {
    # the network, also by sockets that exist
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    # programs and children; threads are made by clone
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    # files and folders: all that changes them
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265),
    # the machine
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "personality": (135, 92),
}
# Libraries use the older call instead where there is none of these, whose arguments a filter cannot see.
UNKNOWN: Mapping[str, tuple[int, int]] = {"clone3": (435, 435), "openat2": (437, 437)}
CLONE, KILL_CALL, TGKILL, PRLIMIT = (56, 220), (62, 129), (234, 131), (302, 261)
OPEN, OPENAT = (2, None), (257, 56)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def confine(memory_bytes: int) -> bool:
    """Limit this process for good; whether the kernel filters its calls too. Raises OSError.

    `memory_bytes` bounds its address space. No file may grow by it, 64 be open at once, and no core file is written.
    """
    import resource

    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MOST_OPEN_FILES),
    ):
        resource.setrlimit(limit, (value, value))
    if sys.platform != "linux":
        return False
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    libc = ctypes.CDLL(None, use_errno=True)
    _drop_capabilities(libc)
    _control(libc, PR_SET_NO_NEW_PRIVS, 1)
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return False
    program = filter_program(*machine, os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    _control(libc, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(pointer, len(pointer)))
    return True


def filter_program(column: int, architecture: int, pid: int) -> bytes:
    """The filter, as an array of struct sock_filter; `column` chooses the numbers of the architecture."""
    rules: list[Rule] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
    ]
    for numbers in FORBIDDEN.values():
        if (number := numbers[column]) is not None:
            rules += [(EQUAL, 0, 1, number), (RETURN, 0, 0, KILL)]
    for numbers in UNKNOWN.values():
        rules += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ERRNO | ENOSYS)]
    # Calls that are judged by an argument: allowed where it has one of the bits, or none of them, or the value.
    rules += _judged(CLONE[column], 0, [(ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, KILL)])
    for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
        if (number := numbers[column]) is not None:
            writing = [(ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)]
            rules += _judged(number, argument, writing)
    for number in (KILL_CALL[column], TGKILL[column]):
        rules += _judged(number, 0, _only((pid,)))
    rules += _judged(PRLIMIT[column], 0, _only((0, pid)))
    rules.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def _judged(number: int, argument: int, verdict: Sequence[Rule]) -> list[Rule]:
    load = (LOAD, 0, 0, ARGUMENTS + 8 * argument)
    return [(EQUAL, 0, len(verdict) + 1, number), load, *verdict]


def _only(values: Iterable[int]) -> list[Rule]:
    allowed = [rule for value in values for rule in ((EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [*allowed, (RETURN, 0, 0, KILL)]


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Of root's powers, keep no more than to read the files of others; nothing is done for other users."""
    if os.geteuid():
        return
    for capability in range(64):
        if not _KEPT_BY_ROOT >> capability & 1:
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION, 0))
    data = ctypes.create_string_buffer(24)  # two of struct __user_cap_data_struct: effective, permitted, inheritable
    _checked(libc.capget(header, data))
    effective, permitted, *_ = struct.unpack("6I", data.raw)
    mine = struct.pack("6I", effective & _KEPT_BY_ROOT, permitted & _KEPT_BY_ROOT, 0, 0, 0, 0)
    _checked(libc.capset(header, ctypes.create_string_buffer(mine, len(mine))))


def _control(libc: ctypes.CDLL, operation: int, value: int, pointer: object = 0) -> None:
    _checked(libc.prctl(operation, value, pointer, 0, 0))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
