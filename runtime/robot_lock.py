"""One driver per robot on one machine: a lock that ends with its holder, however that ends.

The lock is the kernel's (flock) on a file in a folder that all users share. flock is called here rather than through filelock because the
file also says who holds it, and must be opened without creating or cutting it where another user made it (Linux refuses O_CREAT on other
people's files in shared folders). Drivers on other machines: runtime.commands.select.competitors.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from bundle.errors import RobotLockedError

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no links; a pipe of that name must not hang us
_MOST_TEXT = 200
_ATTEMPTS = 100
_RUN_LOCK = Path("/run/lock")


class _Holder(msgspec.Struct, frozen=True):
    """Who holds the lock, as it says in the file; informs people and decides nothing."""

    pid: int
    command: str
    since: str


@contextmanager
def lock_robot(key: str) -> Iterator[None]:
    """Be the only one who drives a robot.

    Args:
        key: what identifies it (runtime.commands.select.robot_key); empty locks nothing.

    Raises:
        RobotLockedError: another process drives it, or the lock cannot be made; the message says who or why.
    """
    if not key:
        yield
        return
    path = lock_file(key)
    number = _acquire(path, key)
    _HELD.add(number)
    try:
        yield
    finally:
        if number in _HELD:  # not in a fork
            _HELD.discard(number)
            with suppress(OSError):  # made by another user: it stays
                path.unlink()
            os.close(number)  # lets go of the lock


def lock_file(key: str) -> Path:
    """The file for a robot, the same for every user: in /run/lock where everybody may write there, else in /tmp."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")[:60]
    name = f"jetvla-{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.lock"
    return (_RUN_LOCK if _is_shared(_RUN_LOCK) else Path("/tmp")) / name


def _is_shared(folder: Path) -> bool:
    try:
        return bool(folder.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return False


_HELD: set[int] = set()


def _let_go() -> None:
    for number in _HELD:
        os.close(number)
    _HELD.clear()


# A fork would keep the lock of a process that has died. Closing its copy leaves the lock with the parent.
os.register_at_fork(after_in_child=_let_go)


def _acquire(path: Path, key: str) -> int:
    """Open and lock. A holder removes its file before it lets go, so what was locked counts only if it is still what the path names."""
    for _ in range(_ATTEMPTS):
        try:
            number = _open(path)
        except OSError as error:
            raise _cannot(path, os.strerror(error.errno or 0)) from None
        try:
            _check(number, path)
            _lock(number, path, key)
            if _is_at(number, path):
                _sign(number)
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    raise _cannot(path, "a file that comes and goes")


def _open(path: Path) -> int:
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            return os.open(path, _FLAGS)
        with suppress(FileExistsError):  # another process was quicker
            number = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(number, 0o666)  # whatever the umask: the next driver may be another user
            return number
    raise OSError(errno.EBUSY, "")


def _check(number: int, path: Path) -> None:
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # a hard link could name any file of ours
        raise _cannot(path, "something else than a plain file")


def _lock(number: int, path: Path, key: str) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RobotLockedError(
            f"somebody else is driving this robot ({key})",
            got=_who(number),
            expected="nobody",
            hint=f"end that process first. The lock is {path}; it ends with its holder, so leave the file alone.",
        ) from None
    except OSError as error:
        raise _cannot(path, os.strerror(error.errno or 0)) from None


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.lstat())
    except FileNotFoundError:
        return False


def _sign(number: int) -> None:
    command = " ".join(sys.orig_argv)[:_MOST_TEXT]
    since = time.strftime("%Y-%m-%d %H:%M:%S%z")
    text = msgspec.json.encode(_Holder(pid=os.getpid(), command=command, since=since))
    with suppress(OSError):  # a full disk: the lock holds without its label
        os.ftruncate(number, 0)
        os.pwrite(number, text, 0)


def _who(number: int) -> str:
    try:
        holder = msgspec.json.decode(os.pread(number, 4096, 0), type=_Holder)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return "a process that has not written its name"
    shown = "".join(letter if letter.isprintable() else "?" for letter in f"{holder.command}, since {holder.since}")
    return f"process {holder.pid}: {shown[: 2 * _MOST_TEXT]}"


def _cannot(path: Path, got: str) -> RobotLockedError:
    return RobotLockedError(
        "cannot lock the robot against a second driver",
        got=f"{path}: {got}",
        expected="a plain file that can be written",
        hint="remove what is there by that name, or have its owner do so.",
    )
