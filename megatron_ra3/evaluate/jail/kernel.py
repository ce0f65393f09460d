"""The Linux calls the jail is made of, and its seccomp filter; ctypes, because the standard library lacks them.

The filter denies what no benchmark program needs and what widens the kernel's attack surface: namespaces, mounts,
tracing, bpf, keys, io_uring, sockets, System V objects, anonymous files outside the memory limits, and every call
newer than the list below. Without `processes`, starting a process or another program is denied too.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Callable

CLONE_NEWPID = 0x20000000
CLONE_NEW_ANY = 0x7E020080
"""All namespace flags of clone, the time namespace included."""
CLONE_THREAD = 0x10000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.capset.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
_holding_gil = ctypes.PyDLL(None, use_errno=True)
_CAPABILITY_VERSION_3 = struct.pack("Ii", 0x20080522, 0)

Step = tuple[str, Callable[..., object], tuple[object, ...]]
"""A call that is still to be made: its name for errors, the function, its arguments. It returns 0 or None, or fails."""


def take(step: Step) -> None:
    """Make the call; OSError naming it."""
    what, function, arguments = step
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def fork() -> int:
    """Fork as the C library does, without what Python adds for processes with threads.

    That part of `os.fork` (locks, thread tables, seeds) writes to some 180 pages in the child, each of which is then
    copied: half the cost of a fork. This process must have one thread, and its child must end by `os._exit`.
    """
    pid = int(_holding_gil.fork())
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fork: {os.strerror(number)}")
    return pid


def unshare(flags: int) -> Step:
    """Leave namespaces for new ones."""
    return "unshare", _libc.unshare, (flags,)


def setns(descriptor: int, kind: int) -> Step:
    """Enter a namespace."""
    return "setns", _libc.setns, (descriptor, kind)


def mount(kind: str, target: str, flags: int, options: str) -> Step:
    """Mount a fresh file system of `kind` on `target`."""
    arguments = (kind.encode(), target.encode(), kind.encode(), flags, options.encode())
    return f"mount of {kind} on {target}", _libc.mount, arguments


def detach(target: str) -> Step:
    """Unmount `target` for everybody who does not use it right now."""
    return f"umount of {target}", _libc.umount2, (target.encode(), MNT_DETACH)


def prctl(option: int, first: int, second: int = 0) -> Step:
    """Set a property of this process."""
    return f"prctl {option}", _libc.prctl, (option, first, second, 0, 0)


def drop_capabilities() -> Step:
    """Give up every capability of this thread, for good once no_new_privs is set."""
    return "capset", _libc.capset, (_CAPABILITY_VERSION_3, bytes(24))


_X86_64 = {
    "shm": (29, 30, 31, 67),
    "socket": (41,),
    "sem": (64, 65, 66, 220),
    "msg": (68, 69, 70, 71, 240, 241, 242, 243, 244, 245),
    "ptrace": (101, 310, 311, 312),
    "kernel": (103, 135, 154, 163, 167, 168, 169, 172, 173, 175, 176, 179, 246, 313, 320),
    "clock": (159, 164, 227, 305),
    "mount": (155, 161, 165, 166),
    "names": (170, 171, 272, 303, 304, 308),
    "keys": (248, 249, 250),
    "surface": (256, 278, 279, 298, 300, 319, 321, 323),
}
_AARCH64 = {
    "shm": (194, 195, 196, 197),
    "socket": (198,),
    "sem": (190, 191, 192, 193),
    "msg": (180, 181, 182, 183, 184, 185, 186, 187, 188, 189),
    "ptrace": (117, 270, 271, 272),
    "kernel": (89, 92, 104, 105, 106, 116, 142, 224, 225, 60, 273, 294),
    "clock": (112, 170, 171, 266),
    "mount": (39, 40, 41, 51),
    "names": (97, 161, 162, 264, 265, 268),
    "keys": (217, 218, 219),
    "surface": (75, 238, 239, 241, 262, 279, 280, 282),
}
# audit architecture, denied calls, clone, calls that start programs or processes
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, 56, (57, 58, 59, 322)),
    "aarch64": (0xC00000B7, _AARCH64, 220, (221, 281)),
}
_FIRST_RECENT = 424
"""From here on the numbers are the same on all machines, and only the calls listed next are let through."""
# pidfd_send_signal, close_range, openat2, faccessat2, epoll_pwait2, futex_waitv
_RECENT = (424, 436, 437, 439, 441, 449)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS

Instruction = tuple[int, int, int, int]


def seccomp_program(*, processes: bool, machine: str | None = None) -> bytes:
    """The BPF program for this machine; ValueError if its system calls are not listed here.

    A search tree over ranges of numbers: the kernel tries every number when a filter is installed.
    """
    machine = machine or os.uname().machine
    if machine not in _MACHINES:
        raise ValueError(f"no seccomp filter for machine {machine!r}: known are {sorted(_MACHINES)}")
    architecture, denied, clone, starters = _MACHINES[machine]
    allow: list[Instruction] = [(_RETURN, 0, 0, _ALLOW)]
    refuse: list[Instruction] = [(_RETURN, 0, 0, _EPERM)]
    refused = {number for group in denied.values() for number in group} | (set() if processes else set(starters))
    threads_only: list[Instruction] = [] if processes else [(_ANY_BIT, 1, 0, CLONE_THREAD), *refuse]
    meaning = dict.fromkeys(range(_FIRST_RECENT), allow) | dict.fromkeys(refused, refuse)
    meaning[clone] = [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, CLONE_NEW_ANY), *refuse, *threads_only, *allow]
    unknown: list[Instruction] = [(_RETURN, 0, 0, _ENOSYS)]
    meaning |= dict.fromkeys(range(_FIRST_RECENT, max(_RECENT) + 2), unknown)
    meaning |= dict.fromkeys(_RECENT, allow)
    starts = [number for number in meaning if meaning[number] is not meaning.get(number - 1)]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    code += _search([(start, meaning[start]) for start in sorted(starts)])
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _search(ranges: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Code that finds the last of `ranges` (each from its number on) at or below the loaded number, and runs its."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    return [(_AT_LEAST, len(below), 0, ranges[middle][0]), *below, *above]


def seccomp(program: bytes) -> list[Step]:
    """Apply a program to this thread and everything it starts; no_new_privs comes first."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(header, len(header))
    _buffers.extend((buffer, pointer))
    return [prctl(PR_SET_NO_NEW_PRIVS, 1), prctl(PR_SET_SECCOMP, 2, ctypes.addressof(pointer))]


_buffers: list[object] = []
"""What the kernel is going to read."""
