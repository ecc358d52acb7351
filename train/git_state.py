"""Which code a run was made with: the sources themselves, the commit to find them by, and the versions of what they call.

The hash of the sources decides whether two runs had the same code; a commit alone does not, since a working tree may differ from it and
an installed package has none. Imports nothing that it reports on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

_ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("bundle", "episodes", "train")  # what training may import of ours
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow")
_TIMEOUT_S = 20.0


class CodeFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The code of a run.

    Attributes:
        sources_sha256: of every Python file that training may import, with its name.
        commit: of git; None if these files are not in a git checkout, or git cannot be asked.
        dirty: whether files of our packages differed from the commit, or untracked ones lay among them.
        diff_sha256: of `git diff HEAD`, if dirty.
        versions: of Python and the packages that compute; a package that is not installed is left out.
    """

    sources_sha256: str
    commit: str | None
    dirty: bool | None
    diff_sha256: str | None
    versions: dict[str, str]


def code_facts(root: Path = _ROOT) -> CodeFacts:
    """What is under `root` now; call it once, when the run starts."""
    commit = _commit(root)
    # What lies elsewhere in the checkout - runs, notes, recordings - is not what ran.
    status = None if commit is None else _git(root, "status", "--porcelain", "--", *_FOLDERS)
    dirty = None if status is None else bool(status)
    diff = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", *_FOLDERS) if dirty else None
    return CodeFacts(
        sources_sha256=sources_sha256(root),
        commit=commit,
        dirty=dirty,
        diff_sha256=None if diff is None else hashlib.sha256(diff).hexdigest(),
        versions=_versions(),
    )


def sources_sha256(root: Path = _ROOT) -> str:
    """Hex sha256 over names and bytes of the Python files that training may import."""
    digest = hashlib.sha256()
    files = [path for folder in _FOLDERS for path in (root / folder).rglob("*.py")]
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}|{len(data)}|".encode(errors="surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _commit(root: Path) -> str | None:
    """HEAD of the checkout that these files belong to: an environment inside somebody's project is in a checkout, but not of it."""
    if _git(root, "ls-files", "--error-unmatch", "train/__init__.py") is None:
        return None
    head = _git(root, "rev-parse", "--verify", "HEAD")
    return None if head is None else head.decode().strip()


def _git(root: Path, *arguments: str) -> bytes | None:
    # Inside a hook, git's own variables name another repository and index.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
