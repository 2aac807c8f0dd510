"""A sandbox for programs that models wrote: Linux namespaces, made by bubblewrap or by this package itself.

No network, a read-only root with nothing but Python and the system's libraries, an empty environment, no home, a user
of its own, and limits of time, memory and processes. Everything in it dies with its first process, and that with the
one that started it. `jail` is what runs inside.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from halve.errors import RunError

_JAIL = Path(__file__).with_name("jail.py")
_MOST_SAID = 4096
_EVERY_S = 0.02
_START_S = 20.0
"""A busy machine may take this long until the program begins."""
_OWN_USERS = (1 << 20, 1 << 30)
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/nix/store")


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use. Memory counts all its processes together."""

    seconds: int = 10
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 1 << 24


@dataclass(frozen=True)
class Outcome:
    """Whether a program reached its end, and otherwise why not."""

    passed: bool
    why: str = ""


class Sandbox:
    """Runs programs apart from everything. Make one with `open`, which tries it."""

    def __init__(self, kind: str, limits: SandboxLimits) -> None:
        self.kind, self.limits = kind, limits

    @classmethod
    def open(cls, limits: SandboxLimits | None = None) -> Sandbox:
        """A sandbox of the first kind that works on this machine. Raises `RunError` if none does."""
        reasons = []
        for kind in _COMMANDS:
            if _COMMANDS[kind]() is None:
                continue
            box = cls(kind, limits or SandboxLimits())
            try:
                box.require()
            except RunError as error:
                reasons.append(error.why)
                continue
            return box
        raise _no_sandbox("; ".join(reasons) or f"{sys.platform} has no bubblewrap and no Linux namespaces")

    def require(self) -> None:
        """Raise `RunError` unless a harmless program passes and one that fails does not."""
        good = self.run("assert sum(range(5)) == 10")
        if not good.passed:
            raise _no_sandbox(good.why)
        if self.run("raise SystemExit(0)").passed:
            raise _no_sandbox("a program that ends itself counts as passed")

    def _command(self) -> list[str]:
        command = _COMMANDS[self.kind]()
        assert command is not None
        return command

    def run(self, program: str) -> Outcome:
        """Run a program to its end. It passes if it raises nothing and stays within the limits."""
        word = secrets.token_hex(16)
        given = {"limits": asdict(self.limits), "program": program, "word": word}
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as complaints:
            asked.write(json.dumps(given).encode("utf-8"))
            asked.seek(0)
            process = subprocess.Popen(
                self._command(),
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env={},
                cwd="/",
                start_new_session=True,
            )
            try:
                said, why = self._watch(process)
            finally:
                _end(process)
            if said == word.encode():
                return Outcome(True)
            if not why and not said:
                complaints.seek(0)
                why = complaints.read(_MOST_SAID).decode("utf-8", errors="replace").strip()
            return Outcome(False, why or said.decode("utf-8", errors="replace") or "it ended itself")

    def _watch(self, process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
        """What the program says until it ends or breaks a limit, and which."""
        assert process.stdout is not None
        said, began, deadline = b"", time.monotonic(), time.monotonic() + _START_S + self.limits.seconds
        seen = None
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while len(said) < _MOST_SAID:
                if ready.select(_EVERY_S):
                    part = os.read(process.stdout.fileno(), _MOST_SAID)
                    said += part
                    if not part:
                        return said, ""
                used, running = _memory(process.pid)
                if running and seen is None:
                    seen = time.monotonic()
                    deadline = seen + self.limits.seconds
                if used > self.limits.memory_bytes:
                    return b"", f"over {self.limits.memory_bytes >> 20} MiB of memory"
                if time.monotonic() > deadline:
                    return b"", f"over {(deadline - (seen or began)):.0f} seconds"
        return b"", "too much output"


def _memory(pid: int) -> tuple[int, bool]:
    """The resident bytes of a process and all that it started, and whether it has started the program."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return 0, False
    used = 0
    for child in children:
        try:
            used += child.memory_info().rss
        except psutil.Error:
            continue
    return used, len(children) >= 2


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _folders() -> list[str]:
    """What the program sees of the disk: the system's libraries and this Python's own."""
    prefix = os.path.realpath(sys.base_prefix)
    inside = [folder for folder in _SYSTEM if os.path.isdir(folder)]
    return (
        inside if prefix.startswith(tuple(f"{folder}/" for folder in inside)) or prefix in inside else [*inside, prefix]
    )


def _python() -> str:
    """The interpreter itself, not that of a virtual environment."""
    prefix = Path(os.path.realpath(sys.base_prefix))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = prefix / "bin" / name
    return str(path if path.exists() else Path(sys.executable).resolve())


def _namespaces() -> list[str] | None:
    if sys.platform != "linux":
        return None
    source, python = _JAIL.read_text(encoding="utf-8"), _python()
    own_user = str(_OWN_USERS[0] + 2 * secrets.randbelow((_OWN_USERS[1] - _OWN_USERS[0]) // 2))
    return [python, "-I", "-S", "-B", "-c", source, "enter", source, python, own_user, *_folders()]


def _bubblewrap() -> list[str] | None:
    program = shutil.which("bwrap")
    if program is None or os.getuid() == 0:  # whom it would leave root outside, and no limit of processes holds root
        return None
    command = [program, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--cap-drop", "ALL"]
    for folder in _folders():
        linked = os.path.islink(folder)
        command += ["--symlink", os.readlink(folder), folder] if linked else ["--ro-bind", folder, folder]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 26), "--tmpfs", "/tmp"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]
    return [*command, _python(), "-I", "-S", "-B", "-c", _JAIL.read_text(encoding="utf-8"), "answer"]


_COMMANDS = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}


def _no_sandbox(why: str) -> RunError:
    return RunError(
        "this machine has no sandbox for programs that models wrote",
        why=why,
        fix="install bubblewrap, or allow user namespaces; or leave evaluate.run_untrusted_code off",
    )
