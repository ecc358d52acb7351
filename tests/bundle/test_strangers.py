"""Files of others in a bundle's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bundle.strangers import keep_strangers, strangers

OWN = ("vision.fp32.onnx", "reports/build.json")
THEIRS = ("robot.toml", "reports/latency.json", "recordings/a/b.h5", "vision.int8.onnx", "\xe4.md")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "policy.bundle"
    for name in (*OWN, *THEIRS, "engines/sm86/vision.engine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "manifest.json").write_text(
        json.dumps({"schema": 1, "files": {name: {} for name in OWN}}), encoding="utf-8"
    )
    return folder


def test_what_the_manifest_does_not_name(bundle: Path) -> None:
    """A manifest of whatever version; engines are the cache's."""
    assert strangers(bundle) == set(THEIRS)
    assert strangers(bundle.with_name("nothing")) == set()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', None])
def test_without_a_manifest_what_looks_like_a_bundles_is_its_own(bundle: Path, content: bytes | None) -> None:
    (bundle / "manifest.json").unlink()
    if content is not None:
        (bundle / "manifest.json").write_bytes(content)
    assert strangers(bundle) == {"robot.toml", "recordings/a/b.h5", "\xe4.md"}


def test_they_get_a_second_name_and_never_replace_what_is_new(bundle: Path) -> None:
    new = bundle.with_name("new")
    new.mkdir()
    (new / "vision.int8.onnx").write_text("new", encoding="utf-8")
    keep_strangers(bundle, new)
    found = {
        path.relative_to(new).as_posix(): path.read_text(encoding="utf-8") for path in new.rglob("*") if path.is_file()
    }
    assert found == {name: name for name in THEIRS} | {"vision.int8.onnx": "new"}
    assert (bundle / "vision.int8.onnx").read_text(encoding="utf-8") == "vision.int8.onnx"
    assert (bundle / "robot.toml").samefile(new / "robot.toml")
