"""The working folder: second names, what is taken up again, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.manifest import MANIFEST_NAME, Manifest
from calib.calibrate import StageCalibration
from calib.int8_weights import DataFile
from calib.search import Evaluation
from calib.workspace import Workspace, request_sha256
from tests.bundles import edit_manifest, make_bundle

REQUEST, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle")


def open_workspace(bundle: Path, request: str = REQUEST) -> Workspace:
    return Workspace(bundle, Manifest.load(bundle), request)


def evaluation(index: int) -> Evaluation:
    return Evaluation("ort:cpu", ("vision.0", f"language.{index}"), 0.001 * index, 10.0 - index)


def some_calibration() -> StageCalibration:
    rng = np.random.default_rng(0)
    return StageCalibration(
        scales={"vision/layers.0/qkv": 0.0123, "vision/layers.0/out": 1.0},
        smoothing={"layers.0/norm1": rng.random(4, np.float32)},
        peaks={"vision/layers.0/qkv": rng.random(4, np.float32), "vision/layers.0/out": rng.random(3, np.float32)},
        norms={"vision/layers.0/qkv": "layers.0/norm1"},
        outputs=rng.random((2, 8), np.float32),
    )


def test_every_file_has_a_second_name(bundle: Path) -> None:
    workspace = open_workspace(bundle)
    assert workspace.folder.parent == bundle.parent
    assert not workspace.resumed
    names = {MANIFEST_NAME, *Manifest.load(bundle).files}
    assert {path.name for path in workspace.folder.iterdir()} == names
    for name in names:
        assert (workspace.folder / name).stat().st_ino == (bundle / name).stat().st_ino
    workspace.remove()
    assert not workspace.folder.exists()
    Manifest.load(bundle).verify(bundle)


def test_a_disk_without_hard_links(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr("os.link", refuse)
    workspace = open_workspace(bundle)
    Manifest.load(workspace.folder).verify(workspace.folder)


def test_the_folder_of_another_request_is_removed(bundle: Path) -> None:
    neighbour = bundle.parent / ".other.bundle.quantizing-000000000000"
    neighbour.mkdir()
    first = open_workspace(bundle)
    second = open_workspace(bundle, OTHER)
    assert not first.folder.exists()
    assert second.folder.exists()
    assert not second.resumed
    assert neighbour.exists()


def test_a_name_with_a_pattern_in_it(tmp_path: Path) -> None:
    """No other bundle's work is taken for its own."""
    starred, plain = (make_bundle(tmp_path / name) for name in ("tiny[ab]*.bundle", "tinya.bundle"))
    kept = open_workspace(plain)
    first = open_workspace(starred)
    open_workspace(starred, OTHER)
    assert kept.folder.exists()
    assert not first.folder.exists()


def test_a_bundle_behind_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.bundle"
    link.parent.mkdir()
    link.symlink_to(bundle)
    assert open_workspace(link).folder == open_workspace(bundle).folder


def test_what_was_finished_is_taken_up(bundle: Path) -> None:
    first = open_workspace(bundle)
    first.save_calibration("vision", some_calibration())
    first.save_reference({"episode.h5:0-12": np.ones((12, 2, 3), np.float32)})
    for index in range(3):
        first.append(evaluation(index))

    second = open_workspace(bundle)

    assert second.resumed
    found, expected = second.load_calibration("vision"), some_calibration()
    assert found is not None
    assert (found.scales, found.norms) == (expected.scales, expected.norms)
    assert np.array_equal(found.outputs, expected.outputs)
    for ours, theirs in ((found.smoothing, expected.smoothing), (found.peaks, expected.peaks)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert second.load_calibration("language") is None
    assert np.array_equal(second.load_reference()["episode.h5:0-12"], np.ones((12, 2, 3)))
    assert second.journal(Evaluation) == [evaluation(index) for index in range(3)]


def test_a_new_folder_has_nothing(bundle: Path) -> None:
    workspace = open_workspace(bundle)
    assert workspace.load_calibration("vision") is None
    assert workspace.load_integers("vision") is None
    assert workspace.load_reference() == {}
    assert workspace.journal(Evaluation) == []


def test_what_is_missing_is_linked_again(bundle: Path) -> None:
    """Killed while the links were made."""
    (open_workspace(bundle).folder / "golden.npz").unlink()
    assert (open_workspace(bundle).folder / "golden.npz").exists()


def test_the_manifest_is_that_of_the_bundle_now(bundle: Path) -> None:
    """The bundle may have got another one that changes nothing of the request."""
    open_workspace(bundle)
    edit_manifest(bundle, lambda manifest: msgspec.structs.replace(manifest, jetvla="0.0.9"))
    workspace = open_workspace(bundle)
    assert workspace.resumed
    assert Manifest.load(workspace.folder) == Manifest.load(bundle)


# --- damage -------------------------------------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "without its end": lambda raw: raw[:-1],
    "other bytes": lambda raw: raw[:60] + bytes(byte ^ 0xFF for byte in raw[60:-60]) + raw[-60:],
    "zeros": lambda raw: bytes(len(raw)),
    "text": lambda raw: b"not an archive",
}
damaged = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damaged
def test_a_damaged_calibration_is_made_again(bundle: Path, damage: Damage) -> None:
    workspace = open_workspace(bundle)
    workspace.save_calibration("vision", some_calibration())
    path = workspace.folder / "calibration.vision.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert workspace.load_calibration("vision") is None
    workspace.save_calibration("vision", some_calibration())
    assert workspace.load_calibration("vision") is not None


@damaged
def test_a_damaged_reference_is_made_again(bundle: Path, damage: Damage) -> None:
    workspace = open_workspace(bundle)
    workspace.save_reference({"a": np.zeros((12, 2, 3), np.float32), "b": np.ones((12, 2, 3), np.float32)})
    path = workspace.folder / "reference.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert workspace.load_reference() == {}


def some_integers(workspace: Workspace) -> DataFile:
    with DataFile(workspace.integers("vision")) as file:
        file.add("w.int8", np.arange(-127, 127, dtype=np.int8))
        file.add("w.scale", np.ones(4, np.float32))
    workspace.save_integers("vision", file)
    return file


def test_integers_are_taken_up(bundle: Path) -> None:
    file = some_integers(open_workspace(bundle))
    assert open_workspace(bundle).load_integers("vision") == file.tensors


@damaged
@pytest.mark.parametrize("name", ["vision.integers.data", "vision.integers.json"])
def test_damaged_integers_are_made_again(bundle: Path, name: str, damage: Damage) -> None:
    workspace = open_workspace(bundle)
    some_integers(workspace)
    path = workspace.folder / name
    path.write_bytes(damage(path.read_bytes()))
    assert workspace.load_integers("vision") is None
    path.unlink()
    assert workspace.load_integers("vision") is None


def test_integers_that_were_being_written_are_not_finished(bundle: Path) -> None:
    workspace = open_workspace(bundle)
    with DataFile(workspace.integers("vision")) as file:
        file.add("w.int8", np.arange(-127, 127, dtype=np.int8))
    assert workspace.load_integers("vision") is None


# --- the journal --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return open_workspace(make_bundle(tmp_path_factory.mktemp("shared") / "tiny.bundle"))


@settings(max_examples=40)
@given(cut=st.integers(0, 400), entries=st.integers(1, 4))
def test_a_line_that_was_cut_is_tried_again(shared: Workspace, cut: int, entries: int) -> None:
    """Wherever: whole lines stay, and the next entry is a line of its own."""
    workspace = shared
    (workspace.folder / "evaluations.jsonl").unlink(missing_ok=True)
    for index in range(entries):
        workspace.append(evaluation(index))
    path = workspace.folder / "evaluations.jsonl"
    raw = path.read_bytes()
    assert raw.count(b"\n") == entries
    whole = raw[: cut % len(raw)]
    path.write_bytes(whole)
    complete = [evaluation(index) for index in range(whole.count(b"\n"))]

    read = workspace.journal(Evaluation)
    assert read[: len(complete)] == complete
    assert read in (complete, [*complete, evaluation(len(complete))])  # cut before the end of the line only

    workspace.append(evaluation(9))
    assert workspace.journal(Evaluation) == [*complete, evaluation(9)]


def test_lines_of_something_else_are_left_out(bundle: Path) -> None:
    workspace = open_workspace(bundle)
    workspace.append(evaluation(0))
    path = workspace.folder / "evaluations.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n{}\n[1]\n\n" + path.read_bytes() + b'{"backend": 3}\n')
    assert workspace.journal(Evaluation) == [evaluation(0)]
    workspace.append(evaluation(1))
    assert workspace.journal(Evaluation) == [evaluation(0), evaluation(1)]


def test_requests() -> None:
    assert request_sha256("a", 1) == request_sha256("a", 1)
    assert len({request_sha256(*parts) for parts in (("a", 1), ("a", 2), ("a1",), (["a"], 1), ())}) == 5
