"""An engine is taken only if its record fits the bundle and the machine; everything else under engines/ is shown and can go."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bundle import engine_cache
from bundle.engine_cache import EngineRecord, EngineSettings, content_key, engine_key, newest, survey
from bundle.errors import EngineError, StorageError
from bundle.hashing import sha256_file
from bundle.manifest import Manifest
from tests.bundles import Tiny, add_int8, edit_manifest, make_bundle

SETTINGS = EngineSettings(optimization_level=3, refit=False, code="c", graph="g")
MACHINE = "orin-sm87x8-trt10.3.0-cuda12"

Add = Callable[..., EngineRecord]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle", Tiny())


@pytest.fixture
def add(bundle: Path) -> Add:
    """Publish an engine of these bytes for a stage of the bundle."""

    def make(
        stage: str = "vision", sequence: int | None = None, data: bytes = b"engine", into: Path = bundle, **fields: Any
    ) -> EngineRecord:
        manifest = Manifest.load(into)
        content = fields.pop("content", content_key(manifest, stage, manifest.graph(stage, sequence)))
        settings, fingerprint = fields.pop("settings", SETTINGS), fields.pop("fingerprint", MACHINE)
        folder = engine_cache.fingerprint_folder(into, fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".building"
        temporary.write_bytes(data)
        record = engine_cache.new_record(
            **{
                "stage": stage,
                "sequence": sequence,
                "content": content,
                "key": engine_key(content, fingerprint, settings),
                "fingerprint": fingerprint,
                "settings": settings,
                "origin": "built",
                "sha256": sha256_file(temporary),
                "bytes": len(data),
                "layers": 1,
                "inputs": (),
                "outputs": (),
                "seconds": 0.0,
                "built_at": "2026-01-01T00:00:00+00:00",
                **fields,
            }
        )
        engine_cache.publish(into, temporary, record)
        return record

    return make


def states(bundle: Path) -> list[str]:
    return [found.state for found in survey(bundle, Manifest.load(bundle))]


# --- keys ---------------------------------------------------------------------------------------------------------------------


def test_content_is_everything_that_an_engine_is_made_of(bundle: Path) -> None:
    replace = msgspec.structs.replace
    manifest = Manifest.load(bundle)
    # Weights in a file of their own, as real bundles have them.
    apart = {name: replace(entry, weights="token_embedding.npy") for name, entry in manifest.stages.items()}
    manifest = replace(manifest, stages=apart)
    graph = manifest.graph("language", 12)
    base = content_key(manifest, "language", graph)

    def with_file(name: str) -> Manifest:
        return replace(manifest, files={**manifest.files, name: replace(manifest.files[name], sha256="0" * 64)})

    entry = replace(manifest.stages["language"], precision="fp16")
    others = [
        content_key(with_file(graph.file), "language", graph),
        content_key(with_file(manifest.stages["language"].weights), "language", graph),
        content_key(replace(manifest, stages={**manifest.stages, "language": entry}), "language", graph),
        content_key(manifest, "language", manifest.graph("language", 24)),
    ]
    assert len({base, *others}) == 5
    assert content_key(with_file("golden.npz"), "language", graph) == base


@given(
    st.tuples(st.text(), st.text(), st.integers(0, 5), st.booleans(), st.text()),
    st.tuples(st.text(), st.text(), st.integers(0, 5), st.booleans(), st.text()),
)
def test_keys_are_equal_exactly_if_everything_is(a: Any, b: Any) -> None:
    def key(content: str, machine: str, level: int, refit: bool, code: str) -> str:
        return engine_key(content, machine, EngineSettings(optimization_level=level, refit=refit, code=code, graph="g"))

    assert (key(*a) == key(*b)) == (a == b)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", "a b", "x" * 200, "a\n"])
def test_a_fingerprint_is_a_plain_name(bundle: Path, name: str) -> None:
    with pytest.raises(EngineError, match="fingerprint"):
        engine_cache.fingerprint_folder(bundle, name)


# --- finding ------------------------------------------------------------------------------------------------------------------


def test_found_by_key_and_by_content(bundle: Path, add: Add) -> None:
    record = add()
    assert engine_cache.find(bundle, MACHINE, record.key, "vision", None) == record
    assert engine_cache.find(bundle, MACHINE, "0" * 64, "vision", None) is None
    assert engine_cache.find(bundle, "orin-sm87x16-trt10.3.0-cuda12", record.key, "vision", None) is None
    assert newest(bundle, Manifest.load(bundle), MACHINE) == {("vision", None): record}
    assert states(bundle) == ["current"]


def test_the_newest_settings_win(bundle: Path, add: Add) -> None:
    add(built_at="2026-01-03T00:00:00+00:00")
    later = EngineSettings(optimization_level=5, refit=False, code="c", graph="g")
    record = add(settings=later, built_at="2026-01-04T00:00:00+00:00")
    add(
        settings=EngineSettings(optimization_level=1, refit=False, code="c", graph="g"),
        built_at="2026-01-02T00:00:00+00:00",
    )
    assert newest(bundle, Manifest.load(bundle), MACHINE)["vision", None] == record
    assert states(bundle) == ["current"] * 3


def test_other_content_is_stale(bundle: Path, add: Add) -> None:
    add(content="0" * 64)
    assert newest(bundle, Manifest.load(bundle), MACHINE) == {}
    assert states(bundle) == ["stale"]


def test_engines_from_before_orins_were_told_apart_can_go(bundle: Path, add: Add, tmp_path: Path) -> None:
    record = add(fingerprint="orin-sm87-trt10.3.0-cuda12")
    (bundle / record.file).with_name(engine_cache.TIMING_CACHE).write_bytes(b"times")
    kept = add("action_head")
    (found,) = (found for found in survey(bundle, Manifest.load(bundle)) if found.record == record)
    assert (found.state, "multiprocessors" in found.reason) == ("stale", True)
    new = make_bundle(tmp_path / "new.bundle", Tiny())
    assert engine_cache.carry_over(bundle, new, Manifest.load(new)) == 1
    assert not (new / record.file).parent.exists()
    engine_cache.remove(found)
    assert states(bundle) == ["current"]
    assert not (bundle / record.file).parent.exists()  # its timing cache went along
    assert (bundle / kept.file).exists()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated engine": lambda path: path.write_bytes(b"eng"),
    "no engine": lambda path: path.unlink(),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "half a record": lambda path: path.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes()[:99]),
    "not a record": lambda path: path.with_suffix(".json").write_bytes(b"[]"),
    "not text": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe"),
    "deep": lambda path: path.with_suffix(".json").write_bytes(b"[" * 100_000),
    "another schema": lambda path: path.with_suffix(".json").write_bytes(
        path.with_suffix(".json").read_bytes().replace(b'"schema": 1', b'"schema": 2')
    ),
    "an unknown field": lambda path: path.with_suffix(".json").write_bytes(
        path.with_suffix(".json").read_bytes().replace(b"{", b'{"x": 1, ', 1)
    ),
    "a missing field": lambda path: path.with_suffix(".json").write_bytes(
        path.with_suffix(".json").read_bytes().replace(b'"layers": 1,', b"")
    ),
    "another stage's record": lambda path: path.with_suffix(".json").write_bytes(
        path.with_suffix(".json").read_bytes().replace(b'"vision"', b'"action_head"')
    ),
    "another machine's record": lambda path: path.with_suffix(".json").write_bytes(
        path.with_suffix(".json").read_bytes().replace(MACHINE.encode(), b"thor-sm110-trt10.3.0-cuda13")
    ),
    "a record that leads outside": lambda path: path.with_suffix(".json").write_bytes(
        path.with_suffix(".json").read_bytes().replace(b'"vision"', b'"../../vision"')
    ),
    "another machine's": lambda path: path.parent.rename(path.parent.with_name("thor-sm110-trt10.3.0-cuda13")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_never_loaded(bundle: Path, add: Add, what: str) -> None:
    record = add()
    DAMAGE[what](bundle / record.file)
    manifest = Manifest.load(bundle)
    assert engine_cache.find(bundle, MACHINE, record.key, "vision", None) is None
    for fingerprint in (MACHINE, "thor-sm110-trt10.3.0-cuda13"):
        assert newest(bundle, manifest, fingerprint) == {}
    assert states(bundle) == ["broken"]
    for found in survey(bundle, manifest):
        engine_cache.remove(found)
    assert list((bundle / engine_cache.ENGINES).iterdir()) == []


def test_a_flipped_byte_needs_the_hash(bundle: Path, add: Add) -> None:
    record = add(data=b"engine")
    (bundle / record.file).write_bytes(b"enginf")
    assert engine_cache.find(bundle, MACHINE, record.key, "vision", None) == record
    with pytest.raises(EngineError, match=r"is corrupt(?s:.*)--engines-only"):
        engine_cache.verify(bundle, record)


@pytest.mark.parametrize(("data", "got"), [(None, "missing"), (b"eng", "3 bytes"), (b"engine+", "7 bytes")])
def test_what_is_wrong_with_an_engine_is_said(bundle: Path, add: Add, data: bytes | None, got: str) -> None:
    record = add(data=b"engine")
    path = bundle / record.file
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EngineError, match=f"got: +{got}\n +expected: 6 bytes"):
        engine_cache.verify(bundle, record)


def test_any_other_bytes_are_not_the_engine(bundle: Path, add: Add) -> None:
    data = bytes(range(32))
    record = add(data=data)
    engine_cache.verify(bundle, record)

    @given(st.one_of(st.binary(max_size=40), st.binary(min_size=32, max_size=32)))
    def check(other: bytes) -> None:
        assume(other != data)
        (bundle / record.file).write_bytes(other)
        with pytest.raises(EngineError, match="is corrupt"):
            engine_cache.verify(bundle, record)

    check()


def test_a_damaged_record_never_vouches_for_another_engine(bundle: Path, add: Add) -> None:
    """Whatever a disk does to one byte: no exception, and what is still found is the same engine, or fails its hash."""
    record = add()
    sidecar = (bundle / record.file).with_suffix(".json")
    intact = sidecar.read_bytes()
    manifest = Manifest.load(bundle)

    @given(st.integers(0, len(intact) - 1), st.integers(0, 255))
    @settings(max_examples=300)
    def check(where: int, value: int) -> None:
        content = bytearray(intact)
        content[where] = value
        sidecar.write_bytes(content)
        (seen,) = survey(bundle, manifest)
        found = [engine_cache.find(bundle, MACHINE, record.key, "vision", None)]
        found += newest(bundle, manifest, MACHINE).values()
        for item in found:
            if item is not None:
                assert (item.file, item.content) == (record.file, record.content)
                assert (item.settings, item.fingerprint) == (record.settings, MACHINE)
                with suppress(EngineError):
                    engine_cache.verify(bundle, item)
                    assert item.sha256 == record.sha256
        assert seen.path == bundle / record.file

    check()


def test_killed_between_engine_and_record(bundle: Path, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old record must not vouch for new bytes of the same length."""
    add(data=b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_cache, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        add(data=b"new")
    assert states(bundle) == ["broken"]


def test_the_next_build_mends_what_a_killed_one_left(bundle: Path, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_cache, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            add()
    assert newest(bundle, Manifest.load(bundle), MACHINE) == {}
    record = add()
    engine_cache.verify(bundle, record)
    assert states(bundle) == ["current"]


# --- tidying and carrying over ------------------------------------------------------------------------------------------------


def test_removing_takes_everything_of_an_engine(bundle: Path, add: Add) -> None:
    record = add(data=b"engine")
    for suffix in (".layers", ".jit"):
        (bundle / record.file).with_suffix(suffix).write_bytes(b"x")
    assert states(bundle) == ["current"]
    (found,) = survey(bundle, Manifest.load(bundle))
    assert engine_cache.remove(found) == 6
    assert not (bundle / record.file).parent.exists()


def test_engines_of_both_precisions_are_of_use(bundle: Path, add: Add, tmp_path: Path) -> None:
    """The action head's serve both; what was quantized has engines of its own."""
    manifest = add_int8(bundle)
    view = manifest.int8()
    assert content_key(view, "action_head", view.graph("action_head")) == content_key(
        manifest, "action_head", manifest.graph("action_head")
    )
    floats = [add("vision"), add("language", 12), add("action_head")]
    int8 = [
        add(stage, length, content=content_key(view, stage, view.graph(stage, length)))
        for stage, length in (("vision", None), ("language", 12))
    ]
    assert len({record.file for record in floats + int8}) == 5
    assert states(bundle) == ["current"] * 5
    head = floats[-1]
    assert set(newest(bundle, manifest, MACHINE).values()) == set(floats)
    assert set(newest(bundle, view, MACHINE).values()) == {*int8, head}

    other = make_bundle(tmp_path / "other.bundle")
    assert engine_cache.carry_over(bundle, other, add_int8(other)) == 5
    edit_manifest(bundle, lambda old: msgspec.structs.replace(old, quantized=None))
    assert sorted(states(bundle)) == ["current"] * 3 + ["stale"] * 2


def test_each_precision_has_its_proof(bundle: Path, add: Add) -> None:
    manifest = add_int8(bundle)
    add()
    proofs = [engine_cache.parity_file(bundle, each, MACHINE) for each in (manifest, manifest.int8())]
    assert [path.name for path in proofs] == ["parity.json", "parity.int8.json"]
    for path in proofs:
        path.write_bytes(b"{}")
    assert states(bundle) == ["current"]


def test_leftovers_are_shown(bundle: Path, add: Add) -> None:
    record = add()
    folder = (bundle / record.file).parent
    for name in (".vision.0123.building", "x.jit", "y.layers", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / engine_cache.TIMING_CACHE).write_bytes(b"t")
    (folder / engine_cache.ENGINE_PARITY).write_bytes(b"{}")
    assert sorted(states(bundle)) == ["broken"] * 4 + ["current"]


def test_a_stray_file_does_not_own_its_neighbours(bundle: Path, add: Add) -> None:
    record = add()
    path = bundle / record.file
    path.with_suffix(".layers").write_bytes(b"{}")
    path.with_suffix(".txt").write_bytes(b"notes")
    (stray,) = (found for found in survey(bundle, Manifest.load(bundle)) if found.state == "broken")
    assert engine_cache.remove(stray) == 5
    assert engine_cache.find(bundle, MACHINE, record.key, "vision", None) == record
    assert path.with_suffix(".layers").exists()
    assert states(bundle) == ["current"]


def test_a_temporary_file_of_a_killed_writer_can_go(bundle: Path, add: Add) -> None:
    record = add()
    (bundle / record.file).with_name(f".vision.{record.key[:16]}.json.1.2.tmp").write_bytes(b"{")
    (stray,) = (found for found in survey(bundle, Manifest.load(bundle)) if found.state == "broken")
    assert (stray.record, stray.reason) == (None, "left over, without an engine")
    engine_cache.remove(stray)
    assert states(bundle) == ["current"]


def test_removing_keeps_a_folder_in_which_something_is(bundle: Path, add: Add) -> None:
    record = add()
    cache = (bundle / record.file).with_name(engine_cache.TIMING_CACHE)
    cache.write_bytes(b"times")
    (found,) = survey(bundle, Manifest.load(bundle))
    engine_cache.remove(found)
    assert cache.read_bytes() == b"times"


def test_what_a_new_bundle_takes_along(bundle: Path, add: Add, tmp_path: Path) -> None:
    refittable = EngineSettings(optimization_level=3, refit=True, code="c", graph="g")
    kept = add(data=b"same weights")
    old = add("action_head", content="0" * 64, data=b"old weights")
    refit = add("action_head", content="1" * 64, data=b"old weights to refit", settings=refittable)
    folder = (bundle / kept.file).parent
    (folder / engine_cache.TIMING_CACHE).write_bytes(b"times")
    (bundle / kept.file).with_suffix(".jit").write_bytes(b"compiled")
    (folder / "stray.engine").write_bytes(b"?")
    new = make_bundle(tmp_path / "new.bundle", Tiny())
    assert engine_cache.carry_over(bundle, new, Manifest.load(new)) == 2
    assert (new / kept.file).stat().st_ino == (bundle / kept.file).stat().st_ino
    assert (new / kept.file).with_suffix(".jit").read_bytes() == b"compiled"
    assert (new / refit.file).exists()
    assert not (new / old.file).exists()
    assert not (new / "engines" / MACHINE / "stray.engine").exists()
    assert (new / "engines" / MACHINE / engine_cache.TIMING_CACHE).read_bytes() == b"times"
    assert sorted(states(new)) == ["current", "stale"]


def test_nothing_to_take_along(bundle: Path, tmp_path: Path) -> None:
    assert engine_cache.carry_over(tmp_path / "absent", bundle, Manifest.load(bundle)) == 0
    assert survey(bundle, Manifest.load(bundle)) == []


def test_where_there_are_no_links_engines_are_copied(
    bundle: Path, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    record = add()
    new = make_bundle(tmp_path / "new.bundle", Tiny())
    monkeypatch.setattr(os, "link", refused)
    assert engine_cache.carry_over(bundle, new, Manifest.load(new)) == 1
    engine_cache.verify(new, record)
    assert (new / record.file).stat().st_ino != (bundle / record.file).stat().st_ino


def test_a_linked_engine_is_replaced_not_rewritten(bundle: Path, add: Add, tmp_path: Path) -> None:
    """The old bundle may still be running: what the new one builds over a link must not reach its file."""
    old = add(data=b"engine")
    new = make_bundle(tmp_path / "new.bundle", Tiny())
    engine_cache.carry_over(bundle, new, Manifest.load(new))
    built = add(data=b"another build", into=new)
    engine_cache.verify(new, built)
    engine_cache.verify(bundle, old)
    for found in survey(new, Manifest.load(new)):
        engine_cache.remove(found)
    engine_cache.verify(bundle, old)


def test_a_read_only_disk_is_a_typed_error(bundle: Path, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    record = add()
    (found,) = survey(bundle, Manifest.load(bundle))

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(StorageError, match="cannot write"):
        engine_cache.remove(found)
    with pytest.raises(StorageError, match="cannot write"):
        add(data=b"new")
    engine_cache.verify(bundle, record)


def test_a_full_disk_is_a_typed_error(bundle: Path, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="cannot write"):
        add()
    assert newest(bundle, Manifest.load(bundle), MACHINE) == {}
