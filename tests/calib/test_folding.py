"""The proof that smoothing was folded exactly: on a real variant, on one that was tampered with, and on the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from msgspec import structs
from numpy.typing import NDArray

from bundle.errors import BackendError, BundleError, ConfigError
from bundle.hashing import sha256_file
from bundle.manifest import File, Form, Manifest
from calib.folding import FoldCheck, check_folding, fold, stored_factors
from calib.stage_graph import read_graph
from tests.calib.conftest import Built
from tests.calib.made import Prepared
from tests.calib.quantizing import alike, config, quietly
from tests.export.builds import contents

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def all_int8(built: Built, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with everything in INT8, whatever the clock says; tests must not change it."""
    bundle = Path(shutil.copytree(built(), tmp_path_factory.mktemp("all_int8") / "policy.bundle"))
    _quantize(bundle, recorded)
    return bundle


@pytest.fixture
def own_int8(all_int8: Path, tmp_path: Path) -> Path:
    """The same, as a copy of this test's own."""
    return Path(shutil.copytree(all_int8, tmp_path / "policy.bundle"))


def _quantize(bundle: Path, recorded: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.acceptance._EVENTS", 1.0)
        patch.setattr("calib.selection.stage_times", alike)
        quietly(config(bundle, recorded, **options))


def change_stored(
    bundle: Path,
    stage: str,
    name: str,
    change: Callable[[NDArray[Any]], None],
    kind: type[np.generic] = np.float32,
    form: Form = "portable",
) -> None:
    """Change a tensor of the INT8 variant where it lies, so that only its meaning is wrong: the hashes fit."""
    graph = read_graph(bundle, Manifest.load(bundle).int8(form), stage, None)
    place = {entry.key: entry.value for entry in graph.initializers[name].external_data}
    path = bundle / place["location"]
    values = np.fromfile(path, kind, int(place["length"]) // np.dtype(kind).itemsize, offset=int(place["offset"]))
    change(values)
    with path.open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(values.tobytes())
    sign(bundle, path.name)


def sign(bundle: Path, name: str) -> None:
    """Take a changed file into the manifest."""
    manifest, path = Manifest.load(bundle), bundle / name
    record = File(sha256=sha256_file(path), bytes=path.stat().st_size)
    structs.replace(manifest, files={**manifest.files, name: record}).save(bundle)


def test_a_variant_is_its_policy_but_for_rounding(all_int8: Path) -> None:
    before = contents(all_int8)
    steps: list[int] = []
    vision, language, head = check_folding(all_int8, threads=1, advance=lambda: steps.append(1))
    assert [(each.stage, each.norms) for each in (vision, language)] == [("vision", 6), ("language", 8)]
    for each in (vision, language):
        assert each.passed
        assert 0 < each.difference < 1e-5  # something was folded
        assert 0.4 < each.off <= 0.51
        assert each.smallest < 1 < each.largest
    assert head.passed
    assert (head.stage, head.norms, head.difference) == ("action_head", 0, 0)
    assert 0.4 < head.off <= 0.51
    assert len(steps) == 7
    assert contents(all_int8) == before


def test_a_half_precision_bundle_too(built: Built, recorded: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built("velocities", "fp16"), tmp_path / "policy.bundle"))
    _quantize(bundle, recorded, keep_float=("projection", "action_head"))
    found = list(check_folding(bundle, threads=1))
    assert [each.stage for each in found] == ["vision", "language"]
    for each in found:
        assert each.passed
        assert each.off <= 0.51
        assert 0 < each.difference < 5e-3


def test_the_factors_are_those_of_the_calibration(fp32: Prepared) -> None:
    graph = fp32.graphs[fp32.first("vision")]
    known = fp32.found["vision"].smoothing
    before = {name: graph.array(name) for name in fold(graph, known)}
    stored = {f"{name}.smooth": value for name, value in fold(graph, known).items()}
    dead = "layers.0/norm1.weight"
    before[dead] = before[dead].copy()
    before[dead][3] = stored[f"{dead}.smooth"][3] = 0  # told by beta then

    class Half:
        initializers = stored
        array = staticmethod(stored.__getitem__)

    class Whole:
        sites, model = graph.sites, graph.model
        array = staticmethod(before.__getitem__)

    found = stored_factors(Whole, Half)  # type: ignore[arg-type]
    assert found.keys() == known.keys()
    for norm, s in found.items():
        assert s == pytest.approx(known[norm], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.1/norm1.weight.smooth", lambda values: np.multiply(values, 1.5, out=values)),
        ("layers.1/norm2.bias.smooth", lambda values: np.add(values, 0.05, out=values)),
        ("layers.0/fc1.weight.scale", lambda values: np.multiply(values, 1.02, out=values)),
    ],
)
def test_what_was_not_folded_exactly_is_found(
    own_int8: Path, name: str, change: Callable[[NDArray[np.float32]], None]
) -> None:
    change_stored(own_int8, "vision", name, change)
    vision, *others = check_folding(own_int8 / "manifest.json", threads=1)
    assert not vision.passed
    assert all(each.passed for each in others)


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_graph_that_reads_what_was_not_smoothed_is_found(own_int8: Path, form: Form, parameter: str) -> None:
    """In whatever form, and though no number of the files is wrong."""
    entry = Manifest.load(own_int8).int8(form).graph("vision")
    model = onnx.load(own_int8 / entry.file, load_external_data=False)
    plain = onnx.load(own_int8 / "vision.fp32.onnx", load_external_data=False)
    name = f"layers.1/norm1.{parameter}"
    for node in model.graph.node:
        if node.name == "layers.1/norm1":
            node.input[1 if parameter == "weight" else 2] = name
    model.graph.initializer.extend(each for each in plain.graph.initializer if each.name == name)
    (own_int8 / entry.file).write_bytes(model.SerializeToString())
    sign(own_int8, entry.file)
    vision, *others = check_folding(own_int8, threads=1)
    # Once for each product that reads it.
    assert set(vision.misread) == {f"{entry.file}: layers.1/norm1"}
    assert not vision.passed
    assert all(each.passed for each in others)


@pytest.mark.parametrize(("name", "value"), [("lstm", 7), ("bias32", 2**30), ("scale", np.nan), ("zero", 1)])
def test_integers_that_stand_for_nothing_are_found(own_int8: Path, name: str, value: float) -> None:
    if name == "lstm":
        graph = read_graph(own_int8, Manifest.load(own_int8).int8(), "action_head", None)
        name = next(each for each in graph.initializers if each.endswith(".int8"))
        change_stored(own_int8, "action_head", name, lambda values: values.fill(int(value)), np.int8)
        *_, broken = check_folding(own_int8, threads=1)
    else:
        kind = {"bias32": np.int32, "scale": np.float32, "zero": np.int8}[name]
        form: Form = "ort-cpu" if name == "bias32" else "portable"
        change_stored(own_int8, "vision", f"layers.1/fc1.weight.{name}", lambda values: values.fill(value), kind, form)
        broken, *_ = check_folding(own_int8, threads=1)
    assert not broken.passed


@pytest.mark.parametrize(
    ("difference", "off", "misread", "passed"),
    [
        (1e-6, 0.5, (), True),
        (2e-5, 0.5, (), False),
        (1e-6, 0.6, (), False),
        (1e-6, 0.5, ("a",), False),
        (float("nan"), 0, (), False),
        (0, float("nan"), (), False),
    ],
)
def test_all_must_hold(difference: float, off: float, misread: tuple[str, ...], passed: bool) -> None:
    assert FoldCheck("vision", 1, 0.5, 2, difference, off, misread, 1e-5).passed is passed


def test_an_older_onnxruntime_is_said(all_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.20.1")
    with pytest.raises(BackendError, match="newer ONNX Runtime"):
        list(check_folding(all_int8, threads=1))


def test_a_stage_that_stayed_in_floating_point_is_not_checked(built: Built, recorded: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built(), tmp_path / "policy.bundle"))
    _quantize(bundle, recorded, keep_float=("vision.0-2", "projection", "action_head"))
    assert [each.stage for each in check_folding(bundle, threads=1)] == ["language"]


def test_a_bundle_without_int8_has_nothing_to_check(built: Built) -> None:
    with pytest.raises(ConfigError, match="no INT8 variant"):
        list(check_folding(built(), threads=1))


def test_a_damaged_bundle_is_refused(own_int8: Path) -> None:
    path = own_int8 / "vision.int8.onnx.data"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    with pytest.raises(BundleError):
        list(check_folding(own_int8, threads=1))


def test_the_command_line(own_int8: Path, built: Built, tmp_path: Path) -> None:
    def run(bundle: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(ROOT / "calib" / "check_folding.py"), str(bundle), "--threads", "1", "--json"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    done = run(own_int8)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["passed"]
    assert [each["stage"] for each in said["stages"]] == ["vision", "language", "action_head"]
    assert "PASS" in done.stderr
    change_stored(own_int8, "vision", "layers.1/norm1.weight.smooth", lambda values: values.fill(1))
    failed = run(own_int8)
    assert failed.returncode == 3
    assert not json.loads(failed.stdout)["passed"]
    assert "more than rounding" in failed.stderr
    unquantized = run(built())
    assert (unquantized.returncode, unquantized.stdout) == (2, "")
    assert "ConfigError" in unquantized.stderr
