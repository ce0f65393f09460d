"""The Linux calls the jail is made of, and its seccomp filter; ctypes, because the standard library lacks them.

The filter denies what no benchmark program needs and what widens the kernel's attack surface: namespaces, mounts,
tracing, bpf, keys, io_uring, sockets, System V objects, anonymous files outside the memory limits, and every call
newer than the list below. Without `processes`, starting a process or another program is denied too.
"""

import ctypes
import errno
import os
import platform
import struct

CLONE_NEWPID = 0x20000000
CLONE_NEW_ANY = 0x7E020080
"""All namespace flags of clone, the time namespace included."""
CLONE_THREAD = 0x10000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (unshare)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Enter a namespace (setns)."""
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), "setns")


def mount(kind: str, target: str, flags: int, options: str) -> None:
    """Mount a fresh file system of `kind` on `target`."""
    result = _libc.mount(kind.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(result, f"mount of {kind} on {target}")


def detach(target: str) -> None:
    """Unmount `target` for everybody who does not use it right now."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount of {target}")


def prctl(option: int, first: int, second: object = 0) -> None:
    """Set a property of this process (prctl)."""
    argument = second if isinstance(second, ctypes.c_void_p) else ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(first), argument, 0, 0), f"prctl {option}")


def drop_capabilities() -> None:
    """Give up every capability of this thread, for good once no_new_privs is set."""
    header = struct.pack("Ii", 0x20080522, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


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


def seccomp_program(*, processes: bool, machine: str | None = None) -> bytes:
    """The BPF program for this machine; ValueError if its system calls are not listed here."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ValueError(f"no seccomp filter for machine {machine!r}: known are {sorted(_MACHINES)}")
    architecture, denied, clone, starters = _MACHINES[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 2 * len(_RECENT) + 1, _FIRST_RECENT),
    ]
    for number in _RECENT:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    forbidden = [number for group in denied.values() for number in group]
    for number in forbidden + ([] if processes else list(starters)):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code += [(_EQUAL, 1, 0, clone), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 16)]
    code += [(_ANY_BIT, 0, 1, CLONE_NEW_ANY), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    if not processes:
        code += [(_ANY_BIT, 1, 0, CLONE_THREAD), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def install_seccomp(program: bytes) -> None:
    """Apply a program to this thread and everything it starts; sets no_new_privs first."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(header, len(header))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(pointer)))
