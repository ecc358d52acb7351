"""run.json: what a run records, and that neither a kill nor an editor makes it say something else."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundle.errors import ConfigError, TrainingError
from tests.ledgers import DATA, MACHINE, digest, episode, facts, make_run, write_checkpoint
from train import git_state, ledger_record, run_process
from train.git_state import code_facts, sources_sha256
from train.ledger import BaseFacts, Ledger, ParameterCounts, SplitFacts, read_run, verify_checkpoints
from train.ledger_record import RunRecord, flat, stored_value
from train.run_process import ProcessFacts, is_alive, this_process

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, changes: dict[str, Any] | None = None, **replaced: Any) -> Ledger:
    return Ledger.start(folder, **facts(changes, **replaced))


def resume(folder: Path, changes: dict[str, Any] | None = None, *, from_step: int = 20, **replaced: Any) -> Ledger:
    return Ledger.resume(folder, from_step=from_step, **facts({"name": folder.name} | (changes or {}), **replaced))


def rewrite(folder: Path, **changes: Any) -> None:
    """Put another record there, as a well-formed file."""
    record = msgspec.structs.replace(read_run(folder), **changes)
    (folder / "run.json").write_bytes(record.encode())


def dead_process() -> ProcessFacts:
    """A process of this machine that is over."""
    code = "import msgspec; from train.run_process import this_process as t; print(msgspec.json.encode(t()).decode())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=60)
    return msgspec.json.decode(done.stdout, type=ProcessFacts)


# --- recording ----------------------------------------------------------------------------------------------------------------


def test_records_what_was_given(tmp_path: Path) -> None:
    data = (*DATA, episode("sim_0", kind="sim"))
    start(tmp_path / "runs" / "a", {"loop.seed": 7}, data=data)

    record = read_run(tmp_path / "runs" / "a")

    assert record.status == record.effective_status() == "running"
    assert record.config["loop"]["seed"] == 7
    assert record.config["data"]["actions"] == ["linear_x", "linear_y"]
    assert record.data == data
    assert {kind: (mix.files, mix.frames) for kind, mix in record.mix.items()} == {"real": (5, 90), "sim": (1, 18)}
    assert (record.split.train, record.split.val) == (5, 1)
    assert record.base == BaseFacts(path="base", sha256=digest("base"))
    assert record.parameters == ParameterCounts(trainable=1000, total=5000)
    assert record.machine == MACHINE
    assert record.process == this_process()
    assert record.ended is None
    assert record.started.utcoffset() is not None


def test_records_epochs_and_checkpoints(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", losses=(0.5, 0.2, 0.3))

    record = read_run(folder / "run.json")

    assert record.status == "finished"
    assert record.ended is not None
    assert [(entry.epoch, entry.step, entry.value("val_loss")) for entry in record.epochs] == [
        (1, 10, 0.5),
        (2, 20, 0.2),
        (3, 30, 0.3),
    ]
    assert record.epochs[0].value("unknown") is None
    kept = {entry.file: (entry.kind, entry.step) for entry in record.checkpoints if not entry.removed}
    assert kept == {
        "checkpoints/epoch=002-step=0000020.safetensors": ("best", 20),
        "checkpoints/last.safetensors": ("last", 30),
    }
    assert [entry.file for entry in record.checkpoints if entry.removed] == [
        "checkpoints/epoch=001-step=0000010.safetensors"
    ]
    assert verify_checkpoints(record, folder) == []


def test_every_change_is_on_disk_at_once(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    ledger.epoch(0, 10, 1.0, {"val_loss": 0.5})
    assert len(read_run(tmp_path).epochs) == 1
    ledger.checkpoint(write_checkpoint(tmp_path, "x", "x"), kind="last", epoch=0, step=10, val_loss=0.5)
    assert len(read_run(tmp_path).checkpoints) == 1
    ledger.stop("a signal")
    assert read_run(tmp_path).stop_reason == "a signal"
    assert read_run(tmp_path) == ledger.record


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    metrics = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "one": 1.0}
    ledger.epoch(0, 1, 1.0, metrics)
    ledger.checkpoint(write_checkpoint(tmp_path, "x", "x"), kind="last", epoch=0, step=1, val_loss=math.nan)

    text = (tmp_path / "run.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    entry = read_run(tmp_path).epochs[0]

    assert math.isnan(entry.value("nan") or 0.0)
    assert [entry.value(name) for name in ("inf", "-inf", "one")] == [math.inf, -math.inf, 1.0]
    assert read_run(tmp_path).checkpoints[0].val_loss == "nan"


def test_a_failure_names_error_and_batch(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    ledger.fail(TrainingError("the loss is nan", hint="lower the rate."), batch="left_3.h5, frame 7")

    error = read_run(tmp_path).error

    assert read_run(tmp_path).effective_status() == "failed"
    assert error is not None
    assert error.type == "bundle.errors.TrainingError"
    assert "the loss is nan" in error.message
    assert error.batch == "left_3.h5, frame 7"


def test_a_failure_that_cannot_be_recorded_hides_nothing(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    rewrite(tmp_path, process=dead_process())

    ledger.fail(ValueError("the real error"))  # another process owns the run: refused, but not raised

    assert read_run(tmp_path).error is None


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    before = (tmp_path / "a" / "run.json").read_bytes()

    with pytest.raises(ConfigError, match="holds a run already"):
        start(tmp_path / "a")

    assert (tmp_path / "a" / "run.json").read_bytes() == before


def test_epochs_go_up(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    ledger.epoch(0, 10, 1.0, {})
    ledger.epoch(1, 20, 1.0, {"val_loss": 1.0})
    ledger.epoch(1, 20, 1.0, {"val_loss": 2.0})  # done again after a kill: no duplicate
    for epoch, step in ((0, 30), (1, 21), (2, 19)):
        with pytest.raises(ValueError, match="after epoch 1 at step 20"):
            ledger.epoch(epoch, step, 1.0, {})

    assert [entry.value("val_loss") for entry in read_run(tmp_path).epochs] == [None, 2.0]


def test_nothing_is_added_to_an_ended_run(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    ledger.finish()
    with pytest.raises(ValueError, match="the run is finished"):
        ledger.epoch(0, 10, 1.0, {})
    with pytest.raises(ValueError, match="the run is finished"):
        ledger.stop("late")


def test_checkpoints_lie_in_the_run_and_are_known(tmp_path: Path) -> None:
    ledger = start(tmp_path / "a")
    outside = tmp_path / "x"
    outside.write_text("x")
    with pytest.raises(ValueError, match="is not in the subpath"):
        ledger.checkpoint(outside, kind="last", epoch=0, step=1, val_loss=None)
    with pytest.raises(ValueError, match="never recorded"):
        ledger.removed(tmp_path / "a" / "checkpoints" / "x")
    with pytest.raises(FileNotFoundError):
        ledger.checkpoint(tmp_path / "a" / "absent", kind="last", epoch=0, step=1, val_loss=None)

    assert read_run(tmp_path / "a").checkpoints == ()


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    file = msgspec.structs.replace(DATA[0], path=os.fsdecode(b"\xbf\xde.h5"))
    start(tmp_path, data=(file, *DATA[1:]))

    assert read_run(tmp_path).data[0].path == r"\udcbf\udcde.h5"


def test_settings_that_json_cannot_hold() -> None:
    assert stored_value({"a": (1, Path("x")), "b": math.nan}) == {"a": [1, "x"], "b": "nan"}
    with pytest.raises(TypeError, match="a object cannot be recorded"):
        stored_value({"a": [object()]})


def test_flat_names_leaves_by_path() -> None:
    config = {"a": {"b": 1, "c": {}}, "sources": [{"kind": "real"}, {"kind": "sim"}], "list": [1, 2]}
    assert flat(config) == {
        "a.b": 1,
        "a.c": {},
        "sources[0].kind": "real",
        "sources[1].kind": "sim",
        "list": [1, 2],
    }


# --- reading ------------------------------------------------------------------------------------------------------------------


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path} is not a run(.|\n)*no run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"status": "finished"', '"status": "excellent"', r"Invalid enum value 'excellent' - at `\$.status`"),
        ('"seconds": 1.5', '"seconds": "1.5"', r"`\$.epochs\[0\].seconds`"),
        ('"trainable": 1000', '"trainable": -1', r"`\$.parameters.trainable`"),
        ('"trainable": 1000', '"trainable": 1000, "more": 1', r"unknown field `more` - at `\$.parameters`"),
        ('"schema": 1', '"schema": 2', "another schema version(.|\n)*update jetvla"),
        ('"schema": 1', '"schema": true', "another schema version"),
        ('"schema": 1', '"schema": "1"', "another schema version"),
        ('"val_loss": 0.1,', '"val_loss": 0.01,', "changed after it was written"),
        ('"status": "finished"', '"status": "stopped"', "changed after it was written"),
        ("}", "", "is not JSON"),
    ],
)
def test_an_edited_record_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    make_run(tmp_path / "a")
    path = tmp_path / "a" / "run.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))

    with pytest.raises(ConfigError, match=message) as caught:
        read_run(path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"null", b'"schema"', b"[" * 100_000])
def test_what_is_no_record_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "run.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("file", ["../x", "/x", "a/../../x", ""])
def test_checkpoints_outside_the_folder_are_refused(tmp_path: Path, file: str) -> None:
    make_run(tmp_path / "a")
    record = read_run(tmp_path / "a")
    rewrite(tmp_path / "a", checkpoints=(msgspec.structs.replace(record.checkpoints[0], file=file),))

    with pytest.raises(ConfigError, match="outside its folder"):
        read_run(tmp_path / "a")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(st.text(), PLAIN, max_size=4),
    metrics=st.lists(st.dictionaries(st.text(), st.floats(), max_size=3), max_size=3),
    message=st.text(),
)
def test_round_trip(tmp_path: Path, config: dict[str, Any], metrics: list[dict[str, float]], message: str) -> None:
    folder = tmp_path / "run"
    (folder / "run.json").unlink(missing_ok=True)
    ledger = start(folder, config=config)
    for number, values in enumerate(metrics):
        ledger.epoch(number, number, 0.1, values)
    ledger.fail(ValueError(message))

    record = read_run(folder)

    assert record == ledger.record
    assert record.config == stored_value(config)
    for entry, values in zip(record.epochs, metrics, strict=True):
        for name, value in values.items():
            found = entry.value(name)
            assert found is not None
            assert found == value or (math.isnan(found) and math.isnan(value))


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what", "text"),
    [
        (None, "missing", "does not exist"),
        ("weights after step 99", "hash", "has other bytes"),
        ("longer than the weights were", "size", "has another size"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_written(tmp_path: Path, content: str | None, what: str, text: str) -> None:
    folder = make_run(tmp_path / "a")
    path = folder / "checkpoints" / "last.safetensors"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)

    (problem,) = verify_checkpoints(read_run(folder), folder)

    assert (problem.file, problem.what) == ("checkpoints/last.safetensors", what)
    assert text in str(problem)


def test_a_folder_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    path = folder / "checkpoints" / "last.safetensors"
    path.unlink()
    path.mkdir()

    assert [problem.file for problem in verify_checkpoints(read_run(folder), folder)] == [
        "checkpoints/last.safetensors"
    ]


def test_a_rewritten_checkpoint_has_one_record(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    for step in (1, 2):
        path = write_checkpoint(tmp_path, "last", f"after {step}")
        ledger.checkpoint(path, kind="last", epoch=0, step=step, val_loss=None)

    (entry,) = read_run(tmp_path).checkpoints

    assert entry.step == 2
    assert verify_checkpoints(read_run(tmp_path), tmp_path) == []


# --- processes ----------------------------------------------------------------------------------------------------------------


def test_a_run_whose_process_is_gone_died(tmp_path: Path) -> None:
    start(tmp_path)
    assert read_run(tmp_path).effective_status() == "running"
    rewrite(tmp_path, process=dead_process())
    assert read_run(tmp_path).effective_status() == "died"
    assert read_run(tmp_path).status == "running"


def test_a_pid_that_was_given_again_is_another_process() -> None:
    own = this_process()
    assert own.start_ticks is not None
    assert is_alive(own) is True
    assert is_alive(msgspec.structs.replace(own, start_ticks=own.start_ticks - 1)) is False


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        process = msgspec.structs.replace(this_process(), pid=child.pid, start_ticks=int(stat[19]))
        assert is_alive(process) is True
        child.kill()
        deadline = time.monotonic() + 20
        while is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_alive(process) is False  # nobody has waited for it yet
    finally:
        child.kill()
        child.communicate()


def test_what_can_and_cannot_be_asked_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    own = this_process()
    rebooted = msgspec.structs.replace(own, boot_id="another")
    assert is_alive(rebooted) is False
    assert is_alive(msgspec.structs.replace(rebooted, host="elsewhere")) is None
    assert is_alive(msgspec.structs.replace(own, pid_namespace="pid:[1]")) is None
    # Without /proc all that is left is asking for the pid.
    monkeypatch.setattr(run_process, "_PROC", Path("/nonexistent"))
    assert is_alive(msgspec.structs.replace(own, boot_id=None)) is True
    assert is_alive(msgspec.structs.replace(own, boot_id=None, pid=dead_process().pid)) is False


def test_a_second_process_stops_the_first(tmp_path: Path) -> None:
    ledger = start(tmp_path)
    rewrite(tmp_path, process=dead_process())

    with pytest.raises(TrainingError, match="another process took over"):
        ledger.epoch(0, 1, 1.0, {})

    assert read_run(tmp_path).epochs == ()


WRITE_FOREVER = """
import sys
from pathlib import Path
from tests.ledgers import facts, write_checkpoint
from train.ledger import Ledger

folder = Path(sys.argv[1])
ledger = Ledger.start(folder, **facts())
print("started", flush=True)
number = 0
while True:
    ledger.epoch(number, number, 1.0, {"val_loss": 1.0 / (number + 1)})
    path = write_checkpoint(folder, f"{number % 3}", str(number))
    ledger.checkpoint(path, kind="last", epoch=number, step=number, val_loss=1.0)
    number += 1
"""


def test_kill_leaves_a_readable_record(tmp_path: Path) -> None:
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        with writer, writer.stdout:
            assert writer.stdout.readline() == "started\n"
            time.sleep(0.15 + 0.05 * attempt)
            writer.send_signal(signal.SIGKILL)
        record = read_run(folder)
        assert record.status == "running"
        assert record.effective_status() == "died"
        assert len(record.epochs) > 0
        assert [entry.epoch for entry in record.epochs] == list(range(len(record.epochs)))
        # At most the file that was being replaced is ahead of its record.
        assert len(verify_checkpoints(record, folder)) <= 1


# --- resuming -----------------------------------------------------------------------------------------------------------------


def stopped(folder: Path, **arguments: Any) -> Path:
    return make_run(folder, end=lambda ledger: ledger.stop("a signal"), **arguments)


def test_resume_takes_back_epochs_past_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_state, "sources_sha256", lambda root: digest("sources"))
    folder = stopped(tmp_path / "a", losses=(0.5, 0.4, 0.3))

    ledger = resume(folder, from_step=20)
    record = read_run(folder)

    assert record.status == "running"
    assert record.stop_reason is None
    assert record.ended is None
    assert [entry.step for entry in record.epochs] == [10, 20]
    assert [(again.from_step, again.code, again.machine) for again in record.resumes] == [(20, None, None)]
    ledger.epoch(3, 30, 1.0, {"val_loss": 0.29})
    ledger.finish()
    assert [entry.epoch for entry in read_run(folder).epochs] == [1, 2, 3]


def test_resume_after_failure_and_death(tmp_path: Path) -> None:
    failed = make_run(tmp_path / "failed", end=lambda ledger: ledger.fail(ValueError("x")))
    died = make_run(tmp_path / "died", end=None)
    rewrite(died, process=dead_process())

    for folder in (failed, died):
        resume(folder)
        record = read_run(folder)
        assert record.effective_status() == "running"
        assert record.error is None
        assert record.process == this_process()


def test_a_process_may_resume_its_own_run(tmp_path: Path) -> None:
    resume(make_run(tmp_path / "a", end=None))

    assert len(read_run(tmp_path / "a").resumes) == 1


def test_a_running_run_is_not_resumed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", end=None)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        rewrite(folder, process=msgspec.structs.replace(this_process(), pid=child.pid, start_ticks=int(stat[19])))
        with pytest.raises(ConfigError, match=f"still running(.|\n)*kill {child.pid}"):
            resume(folder)
    finally:
        child.communicate()


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is finished"):
        resume(make_run(tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "replaced", "message"),
    [
        ({"optimizer.learning_rate": 2e-4}, {}, r"config\.optimizer\.learning_rate: 0\.0001 -> 0\.0002"),
        ({"loop.extra": 1}, {}, r"config\.loop\.extra: nothing -> 1"),
        ({}, {"base": BaseFacts(path="base", sha256=digest("x"))}, r"base\.sha256"),
        ({}, {"split": SplitFacts(sha256=digest("x"), train=4, val=1)}, r"split\.sha256"),
        ({}, {"data": (episode("left_0", content="x"), *DATA[1:])}, r"data: left_0\.h5 is gone or has other bytes"),
        ({}, {"data": (episode("left_0", "val"), *DATA[1:])}, r"data\.left_0\.h5.*'train'.*'val'"),
        ({}, {"data": (*DATA, episode("new"))}, r"data: new\.h5 is new"),
        ({}, {"parameters": ParameterCounts(trainable=999, total=5000)}, r"parameters\.trainable: 1000 -> 999"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(
    tmp_path: Path, changes: dict[str, Any], replaced: dict[str, Any], message: str
) -> None:
    folder = stopped(tmp_path / "a")
    before = (folder / "run.json").read_bytes()

    with pytest.raises(ConfigError, match=message):
        resume(folder, changes, **replaced)

    assert (folder / "run.json").read_bytes() == before


def test_all_differences_are_listed_but_not_hundreds(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a", data=tuple(episode(f"e{index}") for index in range(40)))
    with pytest.raises(ConfigError) as caught:
        resume(folder, {"loop.batch_size": 2}, data=tuple(episode(f"f{index}") for index in range(40)))
    assert "config.loop.batch_size" in str(caught.value)
    assert "more" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_episodes_may_move_between_sittings(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "a")
    moved = tuple(msgspec.structs.replace(file, path="elsewhere/" + Path(file.path).name) for file in DATA)
    split = read_run(folder).split

    resume(folder, data=moved, split=split)

    assert len(read_run(folder).resumes) == 1


def test_other_code_and_machine_are_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_state, "sources_sha256", lambda root: digest("sources"))
    folder = stopped(tmp_path / "a")
    monkeypatch.setattr(git_state, "_versions", lambda: {"python": "9"})
    resume(folder, machine={"gpus": ["another"]}).stop("again")
    resume(folder, machine={"gpus": ["another"]})

    first, second = read_run(folder).resumes

    assert first.code is not None
    assert first.code.versions == {"python": "9"}
    assert first.machine == {"gpus": ["another"]}
    assert (second.code, second.machine) == (None, None)


# --- code ---------------------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def tree(root: Path) -> Path:
    for folder in ("bundle", "episodes", "train"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("")
    return root


def test_code_outside_git_is_known_by_its_sources(tmp_path: Path) -> None:
    tree(tmp_path)
    before = code_facts(tmp_path)
    (tmp_path / "train" / "__init__.py").write_text("x = 1\n")
    after = code_facts(tmp_path)

    assert (before.commit, before.dirty, before.diff_sha256) == (None, None, None)
    assert before.sources_sha256 != after.sources_sha256
    assert {"python", "numpy", "torch"} <= before.versions.keys()


def test_commit_and_changes_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # as in a hook of another repository

    clean = code_facts(tmp_path)
    (tmp_path / "train" / "__init__.py").write_text("x = 1\n")
    changed = code_facts(tmp_path)

    assert len(clean.commit or "") == 40
    assert (clean.dirty, clean.diff_sha256) == (False, None)
    assert changed.commit == clean.commit
    assert changed.dirty is True
    assert changed.diff_sha256 is not None
    assert changed.sources_sha256 != clean.sources_sha256


def test_an_environment_inside_somebodys_checkout_is_not_that_code(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")

    assert code_facts(tree(tmp_path / "site-packages")).commit is None


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_facts().commit is None


def test_renaming_a_source_changes_the_hash(tmp_path: Path) -> None:
    tree(tmp_path)
    before = sources_sha256(tmp_path)
    (tmp_path / "train" / "__init__.py").rename(tmp_path / "train" / "other.py")
    assert sources_sha256(tmp_path) != before


def test_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import train.ledger, train.attribution, train.curves"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_record_is_what_the_documentation_says() -> None:
    documented = (ROOT / "docs" / "ledger.md").read_text()
    missing = [name for name in RunRecord.__struct_fields__ if f"`{name}`" not in documented]
    assert not missing
    assert f"schema {ledger_record.SCHEMA}" in documented
