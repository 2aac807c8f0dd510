"""What runs inside the sandbox. `evaluation.sandbox` passes the text of this file to a bare Python; nothing imports it.

    enter PREFIX...   make namespaces in which only these folders exist, read-only, and go on with `answer` there
    answer            take limits and a program from standard input, and run it

The program's verdict is the word that came with it, written after its last line. A program that ends itself, is killed
or runs out of anything gives none. It has no network, no home, no other process to see, and can write 64 MB in /tmp.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

NO_SANDBOX = 97
"""The exit code where the kernel refuses a part of it. The reason is on standard error."""

_libc = ctypes.CDLL(None, use_errno=True)
_NEW = {"user": 0x10000000, "ns": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000, "uts": 0x4000000}
_BIND, _REC, _PRIVATE, _NOSUID, _NODEV, _NOEXEC = 4096, 16384, 1 << 18, 2, 4, 8
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _NO_NEW_PRIVS, _SECCOMP = 1, 4, 24, 38, 22
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Ways to memory that no limit of a process covers, to other namespaces, and to parts of the kernel that no test needs.
_DENIED = {
    "x86_64": {29, 30, 31, 71, 101, 165, 166, 155, 246, 248, 249, 250, 272, 298, 308, 310, 311, 319, 321, 323, 425, 447}
    | {68, 69, 70, 240, 241, 428, 429, 430, 432, 442},
    "aarch64": {
        194,
        195,
        196,
        187,
        117,
        40,
        39,
        41,
        104,
        217,
        218,
        219,
        97,
        241,
        268,
        270,
        271,
        279,
        280,
        282,
        425,
        447,
    }
    | {186, 188, 189, 180, 181, 428, 429, 430, 432, 442},
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3, _NAMESPACES = 435, 0x7E020000
_EPERM, _ENOSYS = 1, 38


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind)]
    extra = options.encode() if options is not None else None
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), extra), f"mount {target}")


def _read_only(target: str, attributes: int) -> None:
    how = struct.pack("QQQQ", attributes, 0, 0, 0)
    at, flags = ctypes.c_int(_AT_FDCWD), ctypes.c_uint(_AT_RECURSIVE)
    result = _libc.syscall(ctypes.c_long(_MOUNT_SETATTR), at, target.encode(), flags, how, ctypes.c_size_t(len(how)))
    _checked(result, f"read-only {target}")


def _enter(words: list[str]) -> None:
    """Make the namespaces. The first process in them waits for the second, which runs the program.

    Root needs no user namespace, and no limit of processes would hold a user that is root outside. So root becomes two
    other users instead, which nobody else has.
    """
    source, python, own_user, folders = words[0], words[1], int(words[2]), words[3:]
    user, group = os.getuid(), os.getgid()
    kinds = {name: flag for name, flag in _NEW.items() if user != 0 or name != "user"}
    _checked(_libc.unshare(ctypes.c_int(sum(kinds.values()))), "unshare")
    if user != 0:
        for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _build_root(folders)
    if runner := os.fork():
        if user == 0:
            _become(own_user + 1)
        _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _libc.prctl(_DUMPABLE, 0, 0, 0, 0)
        while True:  # what the program leaves behind is handed to this process
            ended, status = os.wait()
            if ended == runner:
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    for capability in range(64):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    if user == 0:
        _become(own_user)
    os.execve(python, [python, "-I", "-S", "-B", "-c", source, "answer"], {})


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _build_root(folders: list[str]) -> None:
    root = "/tmp"
    held = [(folder, os.open(folder, os.O_PATH)) for folder in folders if os.path.isdir(folder)]
    links = [folder for folder in ("/bin", "/lib", "/lib64") if os.path.islink(folder)]
    pointed = {link: os.readlink(link) for link in links}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in ("null", "zero", "random", "urandom")}
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("none", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for folder, descriptor in held:
        if folder in pointed:
            continue
        os.makedirs(root + folder, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", root + folder, None, _BIND | _REC)
        _read_only(root + folder, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
        os.close(descriptor)
    for link, target in pointed.items():
        if not os.path.lexists(root + link):
            os.symlink(target, root + link)
    os.mkdir(f"{root}/dev")
    for name, descriptor in devices.items():
        open(f"{root}/dev/{name}", "w").close()
        _mount(f"/proc/self/fd/{descriptor}", f"{root}/dev/{name}", None, _BIND)
        os.close(descriptor)
    for folder in ("proc", "tmp", "old"):
        os.mkdir(f"{root}/{folder}")
    _mount("none", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.chdir(root)
    _checked(_libc.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), b".", b"old"), "pivot_root")
    os.chdir("/")
    _checked(_libc.umount2(b"/old", 2), "umount")
    os.rmdir("/old")
    _mount("none", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=64m,mode=1777")
    _read_only("/dev", 0)
    _mount("none", "/", None, 32 | 1 | _NOSUID | _NODEV)  # MS_REMOUNT, MS_RDONLY: of the root itself
    os.chdir("/tmp")
    _libc.sethostname(b"sandbox", 7)


def _confine(limits: dict[str, int]) -> None:
    """Limits of this process and its children, and the system calls that they may not make."""
    bounds = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_CPU: limits["seconds"] + 1,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))
    _checked(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    machine = platform.machine()
    # struct sock_filter: code, jump if true, jump if false, value
    load_arch, load_number, load_flags = ((0x20, 0, 0, place) for place in (4, 0, 16))
    deny, missing, allow = ((0x06, 0, 0, value) for value in (0x50000 | _EPERM, 0x50000 | _ENOSYS, 0x7FFF0000))
    checks = [load_arch, (0x15, 1, 0, _ARCH[machine]), deny, load_number]
    checks += [(0x35, 0, 1, 0x40000000), deny] if machine == "x86_64" else []  # the x32 calls
    for number in sorted(_DENIED[machine]):
        checks += [(0x15, 0, 1, number), deny]
    checks += [(0x15, 0, 1, _CLONE3), missing]
    checks += [(0x15, 0, 3, _CLONE[machine]), load_flags, (0x45, 0, 1, _NAMESPACES), deny, allow]
    code = b"".join(struct.pack("HBBI", *check) for check in checks)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(checks), ctypes.addressof(held))
    _checked(_libc.prctl(_SECCOMP, 2, ctypes.c_char_p(program), 0, 0), "seccomp")


def _answer() -> None:
    given = json.load(sys.stdin)
    sys.setrecursionlimit(3000)
    out = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.environ.clear()
    os.chdir("/tmp")
    _confine(given["limits"])
    try:
        exec(compile(given.pop("program"), "<program>", "exec"), {"__name__": "__main__"})
        said = given["word"]
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:200]
    os.write(out, said.encode("utf-8", errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    try:
        _enter(sys.argv[2:]) if sys.argv[1] == "enter" else _answer()
    except (OSError, KeyError) as refusal:
        print(refusal, file=sys.stderr)
        os._exit(NO_SANDBOX)
