"""Writes that happen entirely or not at all.

A file or a bundle directory is prepared under a temporary name beside its target, flushed to the disk, and renamed. A process
killed at any moment leaves the old content or none under the target's name, and a leftover that the next writer removes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from bundle.errors import BundleError, BundleLockedError, StorageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_DISK_ERRORS = _NO_ROOM | {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'the disk is full' and its kin into StorageError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        full = error.errno in _NO_ROOM
        raise StorageError(
            f"cannot write {path}",
            got=os.strerror(error.errno or 0),
            expected="room for the whole output" if full else "a folder that can be written and replaced",
            hint=f"{'free some space or ' if full else ''}choose another folder; nothing was replaced.",
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder for output, and those above it; it may be there.

    Raises:
        StorageError: the disk refuses, or a file is in the way.
    """
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StorageError(
            f"cannot make the folder {folder}",
            got="a file of that name, or above it",
            expected="a folder, or a new path",
            hint="name another --out.",
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically: temporary sibling, fsync, rename.

    Raises:
        StorageError: the disk is full or read-only; an existing file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.{os.getpid()}.tmp")
    remove_leftovers(path)
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            # On a disk that became read-only this fails as well; the first error is the one to tell.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def publish_file(temporary: Path, target: Path) -> None:
    """Give a finished file on the same file system its name: fsync, rename.

    Raises:
        StorageError: the disk is full or read-only; an existing target stays as it was.
    """
    with disk_errors(target):
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that nobody will change: hard links cost nothing; file systems without them get a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of writers that were killed; those of living processes are theirs."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with suppress(OSError):
                leftover.unlink()


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock of a target directory; the lock dies with the process, even by kill -9.

    Raises:
        BundleLockedError: another process holds it.
        StorageError: the folder of the target cannot be made.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder of {target}",
            got=os.strerror(error.errno or 0),
            expected="a folder that can be written",
            hint="choose another --out.",
        ) from None
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        with disk_errors(target):
            lock.acquire(timeout=0)
    except Timeout:
        if not Path(lock.lock_file).exists():
            raise StorageError(
                f"cannot lock {target}",
                got=f"no lock file can be made in {target.parent}",
                expected="a folder that can be written",
                hint="choose another --out.",
            ) from None
        raise BundleLockedError(
            f"another command is writing {target}",
            got="its lock is held",
            expected="one at a time",
            hint="wait for it to end, or work on another bundle.",
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty sibling directory that becomes `target` when the block ends without an error.

    Call it inside `exclusive(target)`: leftovers of killed builds are removed first. On an error the sibling is removed and the
    target is untouched. An existing target is exchanged in one system call where the kernel can (renameat2), else by two
    renames.

    Raises:
        BundleError: the target exists and is not a directory that jetvla wrote.
        StorageError: the disk is full.
    """
    target = target.resolve()  # a link keeps pointing to the directory, which gets the new content
    refuse_foreign(target)
    recover(target)
    prefix = f".{target.name}.building-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = target.parent / f"{prefix}{os.getpid()}"
    with disk_errors(target):
        staging.mkdir()
        try:
            yield staging
            _sync_tree(staging)
            _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def recover(target: Path) -> None:
    """Give a directory its name back if a writer was killed between two renames. Call it inside `exclusive(target)`."""
    target = target.resolve()
    for aside in target.parent.glob(f".{glob.escape(target.name)}.building-*-old"):
        if not target.exists():
            os.rename(aside, target)


def refuse_foreign(target: Path) -> None:
    """Check that a target may be replaced: absent, empty, or a bundle, and not the folder that the user stands in.

    Raises:
        BundleError: it may not.
    """
    if not target.exists():
        return
    if target.resolve() == Path.cwd():
        raise BundleError(
            f"{target} is the current folder",
            expected="a folder of its own",
            hint="a bundle replaces its whole folder; name one, e.g. --out policy.bundle",
        )
    if not target.is_dir() or not (_is_bundle(target) or not any(target.iterdir())):
        raise BundleError(
            f"{target} exists and is not a bundle",
            expected="a new path, an empty directory, or a bundle to replace",
            hint="choose another --out; jetvla does not overwrite what it did not write.",
        )


def _is_bundle(folder: Path) -> bool:
    """True if it is ours, in whatever version or state: the manifest names jetvla, or is damaged beside a golden step."""
    try:
        named = b'"jetvla"' in (folder / "manifest.json").read_bytes()
    except OSError:
        return False
    return named or (folder / "golden.npz").exists()


def _publish(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        aside = staging.with_name(f"{staging.name}-old")
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
