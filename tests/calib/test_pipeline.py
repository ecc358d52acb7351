"""Quantization from end to end: real bundles and real recordings. Processes are in test_quantize.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import calib.pipeline
from bundle.errors import BundleError, CalibrationError, ConfigError, EpisodeError, PromptError
from bundle.manifest import Form, Manifest
from calib.calibrate import Seen, calibrate_stage
from calib.data import Data
from calib.pipeline import STEPS, quantize
from calib.sample import Stretch
from calib.selection import Selection
from calib.trial import Held
from episodes.instruction import sentence
from episodes.reader import open_episode
from episodes.synthetic import write_synthetic
from episodes.writer import write_episode
from export.console import Reporter
from export.pipeline import BuildConfig, build
from runtime.backends.ort import UNSIGNED
from runtime.policy import Policy
from tests.calib.conftest import Built, Own
from tests.calib.quantizing import BLOCKS, GENEROUS, Enough, accepted, config, enough, quietly, report_of
from tests.export.builds import QUICK, contents, left_over
from tests.int8 import signed_saturate
from tests.openvino import openvino_runs_int8
from train.synthetic import SyntheticOptions, make_checkpoint

# Fewer to search in, for tests that are about something else.
SOME = ("projection", "language.0-1")
pytestmark = pytest.mark.usefixtures("driving_by_noise")


def streamed(bundle: Path, recorded: Path, **how: Any) -> NDArray[np.float32]:
    """Actions of a bundle along an episode."""
    policy = Policy.load(bundle, "ort:cpu", threads=1, **how)
    policy.reset(policy.manifest.prompt.instructions[0].text)
    with open_episode(sorted(recorded.glob("*.h5"))[0]) as episode:
        found = np.stack([policy.step(frame).normalized for frame in episode.frames()])
    policy.close()
    return found


# --- what is there afterwards -------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_done(quantized: tuple[Path, str], built: Built) -> None:
    bundle, log = quantized
    manifest = Manifest.load(bundle)
    found = manifest.quantized
    assert found is not None
    assert found.trusted
    assert not found.random
    assert found.verdict == "PASS"
    assert (found.calibration_frames, found.budget, found.method) == (16, GENEROUS, "mse, smoothing 0.5")
    assert tuple(found.assignment) == BLOCKS
    assert set(found.assignment.values()) <= {"int8", "fp32"}
    assert 0 < found.action_error <= GENEROUS
    assert found.frames >= 12
    assert 0.9 < found.golden_cosine < 1
    assert {(row.backend, row.precision) for row in found.measured} == {("ort:cpu", "int8"), ("ort:cpu", "fp32")}
    assert [row.step_ms for row in found.measured] == sorted(row.step_ms for row in found.measured)
    old = Manifest.load(built())
    assert manifest.stages == old.stages
    assert msgspec.structs.replace(manifest, quantized=None, files={}, manifest_sha256="") == msgspec.structs.replace(
        old, files={}, manifest_sha256=""
    )
    assert [f"[{step}/{STEPS}]" in log for step in range(1, STEPS + 1)] == [True] * STEPS


def test_every_file_is_recorded_and_nothing_is_left_beside_it(quantized: tuple[Path, str], built: Built) -> None:
    bundle, _ = quantized
    manifest = Manifest.load(bundle)
    manifest.verify(bundle)
    assert set(contents(bundle)) == set(manifest.files) | {"manifest.json"}
    assert left_over(bundle.parent) == [bundle.name]
    before, after = contents(built()), contents(bundle)
    assert before.keys() < after.keys()
    assert [name for name in before if after[name] != before[name]] == ["manifest.json"]
    assert manifest.quantized is not None
    for stage in manifest.quantized.stages.values():
        buckets = {graph.sequence for graph in stage.graphs}
        assert {(graph.form, graph.sequence) for graph in stage.graphs} == {
            (form, bucket) for form in get_args(Form) for bucket in buckets
        }
        assert stage.weight_bytes == (bundle / stage.weights).stat().st_size


def test_the_reports(quantized: tuple[Path, str]) -> None:
    bundle, _ = quantized
    report, found = report_of(bundle), Manifest.load(bundle).quantized
    assert found is not None
    assert report.chosen in report.tried
    assert len({each.int8 for each in report.tried}) == len(report.tried) == len(BLOCKS) + 1
    assert set(report.without) == set(BLOCKS)
    assert report.acceptances.keys() == {"ort:cpu"}
    assert report.acceptances["ort:cpu"].action_error == found.action_error
    assert {block for block, kind in found.assignment.items() if kind == "int8"} == set(report.chosen.int8)
    assert report.chosen.latency_ms <= 1.02 * min(each.latency_ms for each in report.tried)
    assert report.tries == 1
    assert sum(report.strata.values()) == 16
    assert set(report.seconds) == {"Sample", "Calibrate", "Integers", "Search", "Accept"}
    page = (bundle / "reports" / "quantization.html").read_text()
    for words in ("PASS", found.calibration_sha256[:16], *BLOCKS):
        assert words in page


def test_both_precisions_run(quantized: tuple[Path, str], built: Built, recorded: Path) -> None:
    """Floating point is what it was, to the bit; INT8 is something else, and near."""
    bundle, _ = quantized
    before = streamed(built(), recorded)
    assert np.array_equal(streamed(bundle, recorded, precision="float"), before)
    small = streamed(bundle, recorded, precision="int8")
    assert 0 < np.abs(small - before).max() < 0.5
    policy = Policy.load(bundle, "ort:cpu", precision="int8", threads=1)
    assert policy.manifest.precision == "int8"
    policy.close()


def test_the_report_says_how_far_the_policy_itself_is_off(quantized: tuple[Path, str]) -> None:
    bundle, _ = quantized
    own = report_of(bundle).own
    assert [each.axis for each in own] == list(Manifest.load(bundle).action.names)
    assert all(each.rmse > 0 for each in own)
    assert "off what was recorded" in (bundle / "reports" / "quantization.html").read_text(encoding="utf-8")


def test_the_second_time_there_is_nothing_to_do(quantized: tuple[Path, str], recorded: Path) -> None:
    bundle, _ = quantized
    before, inode = contents(bundle), bundle.stat().st_ino
    log = quietly(config(bundle, recorded))
    assert "has this variant already" in log
    assert contents(bundle) == before
    assert bundle.stat().st_ino == inode


def test_a_backend_that_came_since_is_measured(
    own_quantized: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under auto; the one that was named is all that counts otherwise."""
    monkeypatch.setattr(calib.pipeline, "usable_backends", lambda _: (["ort:cpu", "ort:new"], []))
    monkeypatch.setattr(calib.pipeline, "_calibrate", enough)
    with pytest.raises(Enough):
        quantize(config(own_quantized, recorded))


def test_made_up_pictures_do_not_replace_recordings_by_themselves(own_quantized: Path) -> None:
    before = contents(own_quantized)
    made_up = {"allow_random": True, "instruction": Manifest.load(own_quantized).prompt.instructions[0].text}
    with pytest.raises(ConfigError, match="would replace an INT8 variant that was judged on recordings"):
        quantize(config(own_quantized, None, **made_up))
    assert contents(own_quantized) == before
    log = quietly(config(own_quantized, None, force=True, **made_up))
    assert "NOT JUDGED" in log
    assert "PASS" not in log.replace("parity PASS", "")
    assert "NOT JUDGED" in (own_quantized / "reports" / "quantization.html").read_text(encoding="utf-8")


def test_a_failed_try_says_what_stays(own_quantized: Path, recorded: Path) -> None:
    before = contents(own_quantized)
    with pytest.raises(CalibrationError, match=f"keeps the INT8 variant that it has, of budget {GENEROUS:g}"):
        quantize(config(own_quantized, recorded, max_action_error=1e-6))
    assert contents(own_quantized) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_block_that_does_not_exist_is_found_before_anything_is_computed(
    built: Built, recorded: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    monkeypatch.setattr(calib.pipeline, "_calibrate", enough)
    with pytest.raises(ConfigError, match="--keep-float names no block") as refused:
        quantize(config(built(), recorded, keep_float=("head",), dry_run=dry_run))
    assert refused.value.expected == ", ".join(BLOCKS)


def test_a_dry_run_says_what_would_be_done(built: Built, recorded: Path) -> None:
    log = quietly(config(built(), recorded, keep_float=("action_head",), dry_run=True))
    assert f"to be INT8, if within {GENEROUS:g}: {', '.join(BLOCKS[:-1])}; on ort:cpu" in log
    assert "dry run: nothing was written." in log


@pytest.mark.parametrize("what", ["processor_name", "onnxruntime.__version__"])
def test_on_another_machine_it_is_done_again(
    own_quantized: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Errors and milliseconds are those of a processor and of libraries."""
    monkeypatch.setattr(f"calib.pipeline.{what}", "0.0" if "version" in what else lambda: "another")
    monkeypatch.setattr(calib.pipeline, "_calibrate", enough)
    with pytest.raises(Enough):
        quantize(config(own_quantized, recorded))


def test_what_others_put_into_the_bundles_folder_stays(own_quantized: Path, recorded: Path) -> None:
    theirs = {"robot.toml": b"a", "reports/old/x.txt": b"b", "reports/latency.json": b"c", "notes/\xe4.md": b"d"}
    for name, content in theirs.items():
        (own_quantized / name).parent.mkdir(parents=True, exist_ok=True)
        (own_quantized / name).write_bytes(content)
    stale = set(Manifest.load(own_quantized).files)
    quietly(config(own_quantized, recorded, force=True, keep_float=SOME))
    for name, content in theirs.items():
        assert (own_quantized / name).read_bytes() == content
    left = {path.relative_to(own_quantized).as_posix() for path in own_quantized.rglob("*") if path.is_file()}
    assert left == {*theirs, "manifest.json", *Manifest.load(own_quantized).files}
    assert stale - left  # of the variant before


@pytest.mark.parametrize(
    "options", [{"keep_float": ("action_head",)}, {"max_action_error": 1.9}, {"ranges": "minmax"}], ids=str
)
def test_something_else_is_not_already_there(quantized: tuple[Path, str], recorded: Path, options: Any) -> None:
    """Not done again here: only what it would work on is asked."""
    bundle, _ = quantized
    before = contents(bundle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib.pipeline, "Workspace", enough)
        with pytest.raises(Enough):
            quantize(config(bundle, recorded, **options))
    assert contents(bundle) == before


@pytest.mark.parametrize("spelled", ["policy.bundle/manifest.json", "policy.bundle"])
def test_its_manifest_means_the_bundle(
    own_quantized: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    monkeypatch.chdir(own_quantized.parent)
    reporter = Reporter(STEPS, quiet=True)
    assert quantize(config(Path(spelled), recorded), reporter) == Path("policy.bundle")
    assert "has this variant already" in reporter.log
    assert left_over(own_quantized.parent) == ["policy.bundle"]


def test_stale_workspaces_go_when_there_is_nothing_to_do(own_quantized: Path, recorded: Path) -> None:
    """Killed between the exchange of the bundles and the last step."""
    stale, other = (
        own_quantized.with_name(f".{name}.quantizing-0123456789ab") for name in ("policy.bundle", "b.bundle")
    )
    for folder in (stale, other):
        folder.mkdir()
    assert "has this variant already" in quietly(config(own_quantized, recorded))
    assert not stale.exists()
    assert other.exists()


def test_a_writer_that_was_killed_between_two_renames(own_quantized: Path, recorded: Path) -> None:
    """Under the bundle's name there is nothing; its content is found beside it."""
    before = contents(own_quantized)
    own_quantized.rename(own_quantized.with_name(".policy.bundle.building-4711-old"))
    assert "has this variant already" in quietly(config(own_quantized, recorded))
    assert contents(own_quantized) == before
    assert left_over(own_quantized.parent) == [own_quantized.name]


@pytest.mark.parametrize("damage", ["missing", "other bytes"])
def test_a_damaged_variant_is_found(own_quantized: Path, recorded: Path, damage: str) -> None:
    """The same command makes it again, instead of saying that it is there."""
    break_variant(own_quantized, damage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib.pipeline, "Workspace", enough)
        with pytest.raises(Enough):
            quantize(config(own_quantized, recorded))


def test_a_damaged_variant_is_made_again(own_quantized: Path, recorded: Path) -> None:
    """Also by force, which does not look first: floating point is intact, and more is not needed."""
    bundle = own_quantized
    break_variant(bundle, "other bytes")
    assert "has this variant already" not in quietly(config(bundle, recorded, force=True))
    Manifest.load(bundle).verify(bundle)
    policy = Policy.load(bundle, "ort:cpu", precision="int8", threads=1)
    assert policy.manifest.precision == "int8"
    policy.close()


def break_variant(bundle: Path, damage: str) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.quantized is not None
    path = bundle / next(iter(manifest.quantized.stages.values())).weights
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    if damage == "other bytes":
        path.write_bytes(raw)
    with pytest.raises(BundleError):
        manifest.verify(bundle)


def length_notes(bundle: Path, seen: str, judged: str) -> list[str]:
    """What is said after calibrating on one instruction and judging on another."""
    manifest = Manifest.load(bundle)
    held = (Held(Stretch(Path(), 0, 1, judged), "b", np.zeros(0, np.uint8)),)
    data = Data(None, (Seen(np.zeros(0, np.uint8), seen, "a"),), (), held, "")
    return calib.pipeline._length_notes(manifest, data, bundle)


def test_lengths_that_nobody_has_looked_at_are_said(quantized: tuple[Path, str], built: Built) -> None:
    """Every sequence length gets the integers; recordings may tell nothing of some."""
    bundle, log = quantized
    manifest = Manifest.load(bundle)
    short, long = manifest.prompt.buckets
    note = f"neither calibrated nor judged at {long} slots: no instruction of those recordings runs at that length"
    assert f"warning: {note}" in log
    assert note in report_of(bundle).notes
    assert "more slots than they need" not in log  # the bundle was built for them

    text, wordy = manifest.prompt.instructions[0].text, " ".join(["go to the left of the basket"] * 7)
    for seen, judged, length in ((text, wordy, long), (wordy, text, short)):
        first, second, *_ = length_notes(built(), seen, judged)
        assert first.startswith(f"not calibrated at {length} slots")
        assert second.startswith(f"not judged at {long + short - length} slots")


def test_lengths_that_are_too_long_are_said_in_one_line(built: Built) -> None:
    """The recorded instructions would fit shorter ones, had the bundle been built for them."""
    text = Manifest.load(built()).prompt.instructions[0].text
    twice = " ".join([text] * 2)
    *_, note = length_notes(built(), twice, "Don't stop, " + twice)
    assert note.count("--instruction ") == 2
    assert shlex.split(note.partition("built with ")[2].partition(" takes")[0])[1::2] == sorted(
        [twice, "Don't stop, " + twice]
    )
    assert not any("more slots" in each for each in length_notes(built(), text, text))


@pytest.mark.parametrize("part", ["seen", "search", "test"])
def test_an_instruction_that_does_not_fit_names_its_recording(built: Built, part: str) -> None:
    """Before anything is computed."""
    manifest = Manifest.load(built())
    text, long = manifest.prompt.instructions[0].text, " ".join(["go to the left of the basket"] * 100)
    told = {name: long if name == part else text for name in ("seen", "search", "test")}
    held = {
        name: (Held(Stretch(Path(), 0, 1, told[name]), f"{name}.h5", np.zeros(0, np.uint8)),)
        for name in ("search", "test")
    }
    data = Data(None, (Seen(np.zeros(0, np.uint8), told["seen"], "seen.h5"),), held["search"], held["test"], "")
    with pytest.raises(PromptError, match=f"^{part}.h5: ") as refused:
        calib.pipeline._length_notes(manifest, data, built())
    assert refused.value.got is not None


# --- heads and precisions -----------------------------------------------------------------------------------------------------


def test_a_head_of_classes_counts_other_classes(own: Own, recorded: Path) -> None:
    bundle = own("classes")
    quietly(config(bundle, recorded, keep_float=SOME))
    found = accepted(bundle)
    assert found.gripper_flips is None
    assert found.class_flips is not None
    assert found.class_flips.of_frames == found.frames
    assert found.class_flips.frames == sum(pair.frames for pair in found.class_flips.pairs)
    assert Policy.load(bundle, "ort:cpu", precision="int8", threads=1).manifest.precision == "int8"


def test_a_second_resampler_is_quantized_and_what_a_head_is_told_is_not(recorded: Path, tmp_path: Path) -> None:
    options = SyntheticOptions(layout="fork", head="classes", action_dim=8, told=True, vision_resampler=True)
    files = make_checkpoint(tmp_path, options)
    bundle = tmp_path / "policy.bundle"
    told = (sentence("v1", "left"), sentence("v1", "right"))
    build(
        BuildConfig(checkpoint=files.checkpoint, out=bundle, packing="upstream", instruction=told, verify_frames=QUICK)
    )
    quietly(config(bundle, recorded, keep_float=("language.0-1", "action_head")))
    manifest = Manifest.load(bundle)
    assert manifest.quantized is not None
    assert manifest.quantized.assignment["projection"] == "int8"
    graphs = {
        stage: manifest.quantized.stages.get(stage, manifest.stages[stage]).graphs[0] for stage in manifest.stages
    }
    vision, language = (
        onnx.load(bundle / graphs[stage].file, load_external_data=False).graph for stage in ("vision", "language")
    )
    narrow = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    integers = {item.name.rpartition("/")[0] for item in vision.initializer if item.data_type in narrow}
    assert {f"perceiver/layers.{layer}" for layer in range(6)} <= integers
    assert [item.data_type for item in language.initializer if item.name == "told.weight"] == [onnx.TensorProto.FLOAT]
    actions = streamed(bundle, recorded, precision="int8")
    assert 0 < np.abs(actions - streamed(bundle, recorded, precision="float")).max() < GENEROUS * 10


def test_a_gripper_counts_what_it_does_otherwise(own: Own) -> None:
    bundle = own("actions_gripper")
    quietly(config(bundle, None, allow_random=True, keep_float=SOME))
    found = accepted(bundle)
    assert found.class_flips is None
    assert found.gripper_flips is not None
    assert found.gripper_flips.of_frames == found.frames


def test_an_fp16_bundle(own: Own, recorded: Path) -> None:
    bundle = own("velocities", "fp16")
    before = streamed(bundle, recorded)
    quietly(config(bundle, recorded, keep_float=SOME))
    found = Manifest.load(bundle).quantized
    assert found is not None
    assert {row.precision for row in found.measured} == {"int8", "fp16"}
    assert np.array_equal(streamed(bundle, recorded, precision="float"), before)
    assert 0 < np.abs(streamed(bundle, recorded, precision="int8") - before).max() < 0.5


# --- made-up pictures ---------------------------------------------------------------------------------------------------------


def test_made_up_pictures_are_said_and_run_only_when_named(own: Own) -> None:
    bundle = own()
    log = quietly(config(bundle, None, allow_random=True, keep_float=SOME))
    found = Manifest.load(bundle).quantized
    assert found is not None
    assert found.random
    assert not found.trusted
    assert "accuracy means nothing" in log
    assert "made-up pictures" in (bundle / "reports" / "quantization.html").read_text()
    for precision, runs in (("auto", "fp32"), ("int8", "int8")):
        policy = Policy.load(bundle, "ort:cpu", precision=precision, threads=1)  # type: ignore[arg-type]
        assert policy.manifest.precision == runs
        policy.close()


# --- what is refused ----------------------------------------------------------------------------------------------------------


def record(folder: Path, count: int, *, level: int | None = None) -> Path:
    """Recordings of noise, or of one grey level."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        frames = rng.integers(0, 256, (18, 24, 32, 3), dtype=np.uint8)
        if level is not None:
            frames[:] = level
        actions = rng.uniform(-1, 1, (18, 3))
        write_episode(folder / f"episode_{index}.h5", iter(frames), actions, instruction="go to the left", fps=6.0)
    return folder


def untouched(bundle: Path, before: dict[str, bytes]) -> None:
    """Byte for byte, and nothing was begun."""
    assert contents(bundle) == before
    assert set(left_over(bundle.parent)) <= {bundle.name, "made"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: record(folder, 2), r"3(?s:.*)2|2(?s:.*)3"),
        (lambda folder: record(folder, 4, level=0), "show nothing"),
        (lambda folder: folder.mkdir(), "."),
    ],
    ids=["too few", "all black", "none"],
)
def test_recordings_that_cannot_be_used(own: Own, tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    bundle = own()
    before = contents(bundle)
    make(tmp_path / "made")
    with pytest.raises(EpisodeError, match=message):
        quantize(config(bundle, tmp_path / "made"))
    untouched(bundle, before)


def test_recordings_of_another_robot(own: Own, recorded: Path) -> None:
    bundle = own("actions_gripper")
    before = contents(bundle)
    with pytest.raises(EpisodeError, match=r"another robot"):
        quantize(config(bundle, recorded))
    untouched(bundle, before)


def test_no_recordings_at_all(own: Own) -> None:
    with pytest.raises(ConfigError, match="nothing to calibrate on"):
        config(own(), None)


def test_a_damaged_bundle(own: Own, recorded: Path) -> None:
    bundle = own()
    path = bundle / Manifest.load(bundle).stages["vision"].weights
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    before = contents(bundle)
    with pytest.raises(BundleError, match="is corrupt"):
        quantize(config(bundle, recorded))
    untouched(bundle, before)


@pytest.mark.parametrize("name", ["", "manifest.json"])
def test_the_folder_that_one_stands_in_is_refused_before_any_work(
    own: Own, recorded: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It would be exchanged under one's feet; an hour later is too late to say so."""
    bundle = own()
    before = contents(bundle)
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(calib.pipeline, "read_data", enough)
    with pytest.raises(BundleError, match="is the current folder"):
        quantize(config(Path(name), recorded))
    untouched(bundle, before)


def test_a_block_that_there_is_not(own: Own, recorded: Path) -> None:
    bundle = own()
    with pytest.raises(ConfigError, match=r"vision\.7(?s:.*)vision\.0-2, projection, language\.0-1, action_head"):
        quantize(config(bundle, recorded, keep_float=("vision.7",)))


# --- choices ------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(own: Own, recorded: Path) -> None:
    bundle = own()
    before = contents(bundle)
    log = quietly(config(bundle, recorded, dry_run=True))
    assert "nothing was written" in log
    assert "16 calibration frames" in log
    untouched(bundle, before)


def test_blocks_that_are_to_stay_in_floating_point(own: Own, recorded: Path) -> None:
    """Also on top of a variant that had them in INT8: its files go, and reports that are nobody's stay."""
    bundle = own()
    latency = bundle / "reports" / "latency.json"  # not among the manifest's files
    latency.write_bytes(b"{}\n")
    (bundle / "reports" / "a folder").mkdir()
    quietly(config(bundle, recorded, keep_float=("projection",)))
    found = Manifest.load(bundle).quantized
    assert found is not None
    assert found.assignment["projection"] == "fp32"
    assert all("projection" not in each.int8 for each in report_of(bundle).tried)

    quietly(config(bundle, recorded, keep_float=("action_head", "language.0-1")))
    manifest = Manifest.load(bundle)
    assert manifest.quantized is not None
    assert set(manifest.quantized.stages) == {"vision"}
    assert not [name for name in contents(bundle) if "int8" in name and not name.startswith("vision")]
    assert set(contents(bundle)) == set(manifest.files) | {"manifest.json", "reports/latency.json"}
    assert latency.read_bytes() == b"{}\n"
    manifest.verify(bundle)
    policy = Policy.load(bundle, "ort:cpu", precision="int8", threads=1)
    policy.close()


def test_everything_in_floating_point_is_no_variant(own: Own, recorded: Path) -> None:
    bundle = own()
    before = contents(bundle)
    with pytest.raises(ConfigError, match="nothing is left to be INT8"):
        quantize(config(bundle, recorded, keep_float=BLOCKS))
    assert contents(bundle) == before


def test_a_budget_that_nothing_meets_and_then_another(
    own: Own, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message tells what would do; with that, nothing is computed a second time."""
    bundle = own()
    before = contents(bundle)
    with pytest.raises(CalibrationError, match="no INT8 variant stays within the budget") as refused:
        quantize(config(bundle, recorded, max_action_error=1e-6))
    assert contents(bundle) == before
    best = re.search(r"at best ([0-9.e-]+)", str(refused.value))
    would = re.search(r"would accept it with --max-action-error ([0-9.e-]+);", str(refused.value))
    assert best is not None
    assert would is not None
    assert 1.25 < float(would[1]) / float(best[1]) < 1.45  # the search has a margin, and numbers are rounded

    computed: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*arguments: Any) -> Any:
            computed.append(name)
            return real(*arguments)

        return compute

    for name in ("calibrate_stage", "write_integers"):
        monkeypatch.setattr(calib.pipeline, name, noted(name, getattr(calib.pipeline, name)))
    evaluate = Selection._evaluate
    monkeypatch.setattr(Selection, "_evaluate", noted("evaluation", evaluate))

    with monkeypatch.context() as patch:
        patch.setattr(Selection, "accept", enough)
        with pytest.raises(Enough):
            quantize(config(bundle, recorded, max_action_error=float(would[1])))
    assert set(computed) <= {"evaluation"}  # blocks that come back are tried anew

    computed.clear()
    log = quietly(config(bundle, recorded, max_action_error=GENEROUS))
    assert computed == []
    assert "taking up what an earlier run finished" in log
    assert left_over(bundle.parent) == [bundle.name]
    found = Manifest.load(bundle).quantized
    assert found is not None
    assert found.budget == GENEROUS


@pytest.mark.parametrize("stage", ["language", "action_head"])
def test_what_was_calibrated_is_not_calibrated_again(
    own: Own, recorded: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    bundle = own()
    before = contents(bundle)
    calibrated: list[str] = []
    real = calibrate_stage

    def interrupted(name: str, *rest: Any) -> Any:
        calibrated.append(name)
        if name == stage and calibrated.count(name) == 1:
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(calib.pipeline, "calibrate_stage", interrupted)
    monkeypatch.setattr(calib.pipeline, "_integers", enough)
    with pytest.raises(KeyboardInterrupt):
        quantize(config(bundle, recorded))
    with pytest.raises(Enough):
        quantize(config(bundle, recorded))
    order = ["vision", "language", "action_head"]
    at = order.index(stage)
    assert calibrated == order[: at + 1] + order[at:]
    assert contents(bundle) == before


def test_recordings_of_several_days_may_have_the_same_names(own: Own, tmp_path: Path) -> None:
    """Each held-out stretch is compared with its own reference, and shown with its own pictures."""
    bundle = own()
    for day, seed in (("monday", 0), ("tuesday", 100)):
        folder = tmp_path / "made" / day
        folder.mkdir(parents=True)
        for index in range(5):
            path = write_synthetic(folder, "v1", side="left", seed=seed + index, height=24, width=32)
            path.rename(folder / f"episode_{index}.h5")
    days = tuple(str(tmp_path / "made" / day) for day in ("monday", "tuesday"))
    quietly(config(bundle, None, episodes=days, held_out=36, keep_float=SOME))
    assert accepted(bundle).action_error < 0.5
    assert accepted(bundle).episodes >= 2


def test_all_backends_are_measured(own: Own, recorded: Path) -> None:
    """Those that compute INT8 rightly on this machine; another is left out, and that is said."""
    bundle = own()
    works = ["ort:openvino", "ort:cpu"] if openvino_runs_int8() else ["ort:cpu"]
    quietly(config(bundle, recorded, backend="auto", keep_float=SOME))
    found = Manifest.load(bundle).quantized
    assert found is not None
    rows = {(row.backend, row.precision) for row in found.measured}
    assert rows == {("ort:cpu", "fp32"), *((name, "int8") for name in works)}
    assert report_of(bundle).acceptances.keys() == set(works)
    for backend in works:
        policy = Policy.load(bundle, backend, precision="int8", threads=1)
        assert policy.backend == backend
        policy.close()


def test_a_variant_is_the_same_on_a_cpu_without_vnni(
    quantized: tuple[Path, str], recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whichever products this CPU has; tests/runtime/test_ort_int8.py runs one on an emulated CPU without VNNI."""
    as_it_is = streamed(quantized[0], recorded, precision="int8")
    signed_saturate(monkeypatch)
    assert Policy.load(quantized[0], "ort:cpu", precision="int8", threads=1).remark == UNSIGNED
    assert np.array_equal(streamed(quantized[0], recorded, precision="int8"), as_it_is)
