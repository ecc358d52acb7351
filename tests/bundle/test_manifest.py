"""The manifest keeps what it is told, and refuses everything else with an error that names the place."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import manifest as schema
from bundle.errors import BundleError, BundleVersionError
from bundle.manifest import SCHEMA, Manifest
from runtime.policy import Policy
from tests.bundles import Tiny, add_int8, make_bundle

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
sizes = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
precisions = st.sampled_from(["fp32", "fp16", "int8"])


def tuples(values: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=size).map(tuple)


triples = st.tuples(floats, floats, floats)
tensors = st.builds(schema.Tensor, name=texts, dtype=texts, shape=tuples(sizes))
graphs = st.builds(
    schema.Graph,
    file=texts,
    form=st.sampled_from(["portable", "ort-cpu", "openvino"]),
    sequence=st.none() | sizes,
    nodes=sizes,
    inputs=tuples(tensors, 1),
    outputs=tuples(tensors, 1),
)
stages = st.builds(
    schema.Stage, key=texts, precision=precisions, weights=texts, weight_bytes=sizes, graphs=tuples(graphs, 2)
)
files = st.builds(schema.File, sha256=texts, bytes=sizes)
sources = st.builds(
    schema.Source,
    checkpoint=texts,
    checkpoint_format=texts,
    checkpoint_sha256=texts,
    checkpoint_bytes=sizes,
    weights_sha256=texts,
    base_sha256=st.none() | texts,
    base_tensors=sizes,
    lora_modules=sizes,
    ignored_keys=tuples(texts),
)
dimensions = st.fixed_dictionaries(dict.fromkeys(schema.Dimensions.__struct_fields__, sizes)).map(
    lambda values: schema.Dimensions(**values)
)
prompts = st.builds(
    schema.Prompt,
    packing=st.sampled_from(["upstream", "fork_overwrite"]),
    packing_source=texts,
    template=texts,
    pad_id=sizes,
    eos_id=sizes,
    pad_to=st.none() | sizes,
    embed_scale=floats,
    buckets=tuples(sizes),
    instructions=tuples(st.builds(schema.Instruction, text=texts, token_ids=tuples(sizes)), 2),
    template_source=st.just("") | texts,
)
preprocessings = st.builds(
    schema.Preprocessing,
    color=st.just("RGB"),
    resize=st.sampled_from(["bicubic", "bilinear"]),
    mean=triples,
    std=triples,
    cameras=tuples(texts),
)
actions = st.builds(
    schema.Action,
    head=st.sampled_from(["actions_gripper", "velocities", "classes"]),
    names=tuples(texts),
    units=tuples(texts),
    normalized=st.booleans(),
    minimum=floats,
    maximum=floats,
    mu=st.none() | floats,
    class_names=tuples(texts),
    class_values=tuples(tuples(floats)),
    classes_source=st.just("") | texts,
)
parities = st.builds(
    schema.Parity,
    verdict=st.sampled_from(["PASS", "WARN", "FAIL"]),
    backend=texts,
    frames=sizes,
    feature_cosine=floats,
    feature_max_error=floats,
    action_max_error=floats,
)
quantized = st.builds(
    schema.Quantized,
    stages=st.dictionaries(texts, stages, max_size=2),
    calibration_sha256=texts,
    calibration_frames=sizes,
    random=st.booleans(),
    method=texts,
    assignment=st.dictionaries(texts, precisions, max_size=2),
    budget=floats,
    action_error=floats,
    frames=sizes,
    verdict=st.sampled_from(["PASS", "WARN", "FAIL"]),
    golden_cosine=floats,
    golden_error=floats,
    machine=texts,
    measured=tuples(st.builds(schema.Measured, backend=texts, precision=precisions, step_ms=floats), 2),
)
manifests = st.builds(
    Manifest,
    schema=st.just(SCHEMA),
    jetvla=texts,
    precision=precisions,
    source=sources,
    dimensions=dimensions,
    x_attn_causal=st.booleans(),
    x_attn_causal_source=texts,
    prompt=prompts,
    preprocessing=preprocessings,
    fps=st.none() | floats,
    action=actions,
    stages=st.dictionaries(texts, stages, max_size=2),
    quantized=st.none() | quantized,
    files=st.dictionaries(texts, files, max_size=3),
    parity=parities,
    manifest_sha256=st.just("") | texts,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_bundle(tmp_path_factory.mktemp("manifest") / "tiny.bundle", Tiny(head="classes"))
    add_int8(made)
    return made


@pytest.fixture(scope="module")
def raw(folder: Path) -> bytes:
    return (folder / "manifest.json").read_bytes()


# --- what is written is read ----------------------------------------------------------------------------------------------


def test_facts_that_older_bundles_lack_leave_them_as_they_are(folder: Path, raw: bytes) -> None:
    """Their digest is over what they say; to say where the prompt and the classes are from is new."""
    assert b"template_source" not in raw
    assert b"classes_source" not in raw
    manifest = Manifest.load(folder)
    told = msgspec.structs.replace(manifest, action=msgspec.structs.replace(manifest.action, classes_source="stated"))
    assert told.digest() != manifest.digest()
    assert Manifest.decode(told.encode()).action.classes_source == "stated"


@settings(max_examples=60)
@given(manifests)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    folder = tmp_path_factory.mktemp("round_trip")

    path = manifest.save(folder)

    assert path == folder / "manifest.json"
    assert list(folder.iterdir()) == [path]
    assert Manifest.load(folder) == msgspec.structs.replace(manifest, manifest_sha256=manifest.digest())
    assert Manifest.load(folder) == Manifest.load(str(path)) == Manifest.decode(path.read_bytes())


@settings(max_examples=60)
@given(manifests)
def test_the_digest_is_of_the_content(manifest: Manifest) -> None:
    """Not of the order in which stages and files were recorded, and not of an earlier digest."""
    reordered = msgspec.structs.replace(
        manifest,
        stages=dict(reversed(manifest.stages.items())),
        files=dict(reversed(manifest.files.items())),
        manifest_sha256="f" * 64,
    )

    assert reordered.digest() == manifest.digest()
    assert msgspec.structs.replace(manifest, jetvla=manifest.jetvla + "1").digest() != manifest.digest()


def test_the_digest_is_of_the_json_with_sorted_keys(raw: bytes) -> None:
    content = msgspec.json.decode(raw)
    signature = content["manifest_sha256"]
    bare = msgspec.json.encode(content | {"manifest_sha256": ""}, order="sorted")

    assert hashlib.sha256(bare).hexdigest() == signature


def test_it_is_made_to_be_read(raw: bytes) -> None:
    lines = raw.decode().splitlines()

    assert lines[:2] == ["{", f'  "schema": {SCHEMA},']
    assert raw.endswith(b"}\n")
    assert len(lines) > 100


def test_graphs_are_found_by_stage_and_bucket(folder: Path) -> None:
    manifest = Manifest.load(folder)

    assert manifest.graph("vision").file == "vision.fp32.onnx"
    assert [manifest.graph("language", bucket).file for bucket in (12, 24)] == [
        "language.fp32.s12.onnx",
        "language.fp32.s24.onnx",
    ]
    assert manifest.dimensions.feature == manifest.dimensions.latent * manifest.dimensions.embed_dim == 8


def test_it_cannot_be_changed_in_place(folder: Path) -> None:
    manifest = Manifest.load(folder)
    with pytest.raises(AttributeError, match="immutable"):
        manifest.jetvla = "2"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="immutable"):
        manifest.prompt.pad_id = 2  # type: ignore[misc]


# --- what is refused ------------------------------------------------------------------------------------------------------

Place = tuple[str | int, ...]
# Objects whose keys are names, not fields.
FREE: tuple[Place, ...] = (("stages",), ("files",), ("quantized", "stages"), ("quantized", "assignment"))


def places(value: object, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything inside a JSON value with its place, the value itself first."""
    yield place, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*place, name))


def spelled(place: Place) -> str:
    """A place as the error spells it; entries of `stages`, `files` and `assignment`, whose keys are free, are [...]."""
    parts = ["$"]
    for index, part in enumerate(place):
        free = place[:index] in FREE
        parts.append("[...]" if free else f"[{part}]" if isinstance(part, int) else f".{part}")
    return "".join(parts)


def edited(content: Any, place: Place, edit: Any) -> bytes:
    """The content as JSON after `edit(parent, key)` of the value at `place`."""
    content = copy.deepcopy(content)
    parent = content
    for part in place[:-1]:
        parent = parent[part]
    edit(parent, place[-1])
    return json.dumps(content).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.decode(data, origin="BUNDLE/manifest.json")
    text = str(caught.value)
    assert text.startswith("BUNDLE/manifest.json ")
    assert "\n\nhint: " in text
    return text


def structs(content: Any) -> list[Place]:
    """Places of all objects with fixed fields."""
    return [place for place, value in places(content) if isinstance(value, dict) and place not in FREE]


def test_unknown_fields_are_named(raw: bytes) -> None:
    content = json.loads(raw)
    found = structs(content)
    assert len(found) == 83
    for place in found:
        text = refusal(edited(content, (*place, "surprise"), lambda parent, key: parent.update({key: 1})))
        assert "Object contains unknown field `surprise`" in text
        assert f" - at `{spelled(place)}`" in text or place == ()


def test_missing_fields_are_named(raw: bytes) -> None:
    content = json.loads(raw)
    missing = [(*place, name) for place in structs(content) for name in dict(places(content))[place]]
    assert len(missing) > 150
    for place in missing:
        if place not in (("schema",), ("manifest_sha256",)):  # they have errors of their own
            text = refusal(edited(content, place, lambda parent, key: parent.pop(key)))
            assert f"Object missing required field `{place[-1]}`" in text
            assert f" - at `{spelled(place[:-1])}`" in text or len(place) == 1


@pytest.mark.parametrize("wrong", [None, True, 1, -1.5, "x", [], {}], ids=repr)
def test_wrong_types_are_named(raw: bytes, wrong: object) -> None:
    content = json.loads(raw)
    tried = 0
    for place, value in places(content):
        number = isinstance(value, float) and isinstance(wrong, int | float) and not isinstance(wrong, bool)
        if place in ((), ("schema",)) or type(value) is type(wrong) or number or is_allowed(place, wrong):
            continue
        text = refusal(edited(content, place, lambda parent, key: parent.__setitem__(key, wrong)))
        assert f"does not fit schema {SCHEMA}" in text
        assert f" - at `{spelled(place)}`" in text
        tried += 1
    assert tried > 100


def is_allowed(place: Place, wrong: object) -> bool:
    """Optional fields, and values that mean something else but have the right type."""
    optional = {"base_sha256": (str,), "pad_to": (int,), "sequence": (int,), "mu": (int, float), "fps": (int, float)}
    if place == ("quantized",):
        return wrong is None
    kinds = optional.get(str(place[-1]))
    return kinds is not None and (wrong is None or (isinstance(wrong, kinds) and not isinstance(wrong, bool)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("precision",), "int4"),
        (("prompt", "packing"), "Upstream"),
        (("preprocessing", "color"), "BGR"),
        (("preprocessing", "resize"), "nearest"),
        (("preprocessing", "mean"), [0.5, 0.5]),
        (("preprocessing", "std"), [1.0, 1.0, 1.0, 1.0]),
        (("action", "head"), "diffusion"),
        (("parity", "verdict"), "OK"),
        (("stages", "vision", "precision"), "bf16"),
    ],
)
def test_values_that_no_runtime_knows_are_refused(raw: bytes, place: Place, value: object) -> None:
    text = refusal(edited(json.loads(raw), place, lambda parent, key: parent.__setitem__(key, value)))
    assert f" - at `{spelled(place)}`" in text


@pytest.mark.parametrize("found", [SCHEMA + 1, 99])
def test_a_newer_schema_asks_for_a_newer_jetvla(raw: bytes, found: int) -> None:
    """A newer manifest has fields that we do not know; its version, not those, is what the user must hear of."""
    content = json.loads(raw) | {"schema": found, "engines": {}}
    with pytest.raises(BundleVersionError, match=rf"got:      {found}\n  expected: {SCHEMA}\n\nhint: update jetvla"):
        Manifest.decode(json.dumps(content).encode())


@pytest.mark.parametrize("found", [SCHEMA - 1, -1, None, "1", 1.0, [1]])
def test_an_older_or_odd_schema_asks_for_a_rebuild(raw: bytes, found: object) -> None:
    content = json.loads(raw) | {"schema": found}
    with pytest.raises(BundleVersionError, match=r"another schema version(?s:.*)hint: rebuild the bundle"):
        Manifest.decode(json.dumps(content).encode())


@pytest.mark.parametrize("content", [b"[]", b"3", b'"manifest"', b"null", b"{}"])
def test_json_that_is_no_manifest(content: bytes) -> None:
    with pytest.raises(BundleVersionError, match=f"expected: {SCHEMA}"):
        Manifest.decode(content)


@pytest.mark.parametrize("content", [b"", b"{", b"PK\x03\x04", b'{"schema": 1,}', b"{'schema': 1}", b'{"a": "\xff"}'])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON(?s:.*)hint: rebuild the bundle"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_manifest_cut_short(tmp_path: Path, raw: bytes, share: float) -> None:
    (tmp_path / "manifest.json").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(BundleError, match="is not JSON"):
        Manifest.load(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file", tmp_path / "manifest.json"):
        with pytest.raises(BundleError, match=r"is not a bundle\n  got:      no manifest\.json(?s:.*)build_engines"):
            Manifest.load(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("prompt", "packing"), "fork_overwrite"),
        (("action", "maximum"), 1.16),
        (("preprocessing", "resize"), "bilinear"),
        (("dimensions", "window"), 4),
        (("x_attn_causal",), True),
        (("manifest_sha256",), ""),
    ],
)
def test_edited_by_hand(raw: bytes, place: Place, value: object) -> None:
    text = refusal(edited(json.loads(raw), place, lambda parent, key: parent.__setitem__(key, value)))
    assert "was changed after the build" in text
    assert "manifests are not edited by hand" in text


def test_without_its_digest(raw: bytes) -> None:
    text = refusal(edited(json.loads(raw), ("manifest_sha256",), lambda parent, key: parent.pop(key)))
    assert "was changed after the build" in text


def harmless(raw: bytes, changed: bytes) -> bool:
    """The changed bytes are refused (True), or mean exactly the same (also True)."""
    try:
        loaded = Manifest.decode(changed)
    except BundleError:
        return True
    return loaded == Manifest.decode(raw)


def test_one_flipped_bit_anywhere(raw: bytes) -> None:
    accepted = set()
    for index in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[index] ^= 1 << bit
            try:
                loaded = Manifest.decode(bytes(changed))
            except BundleError:
                continue
            assert loaded == Manifest.decode(raw), f"bit {bit} of byte {index}: {raw[index - 20 : index + 20]!r}"
            accepted.add((raw[index : index + 1], bytes(changed[index : index + 1])))
    # What one bit turns into something that means the same: the exponent's letter, and line ends into nothing else.
    assert accepted <= {(b"e", b"E")}, accepted


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("sort_keys", [False, True])
def test_reformatting_changes_nothing(raw: bytes, indent: int | None, sort_keys: bool) -> None:
    reformatted = json.dumps(json.loads(raw), indent=indent, sort_keys=sort_keys).encode()

    assert reformatted != raw
    assert Manifest.decode(reformatted) == Manifest.decode(raw)


@settings(max_examples=300)
@given(data=st.data())
def test_some_other_bytes_anywhere(raw: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 20)))
    inserted = data.draw(st.binary(max_size=3) | st.sampled_from([b" ", b"\n", b"0", b"-", b",", b'"', b"null"]))

    assert harmless(raw, raw[:start] + inserted + raw[stop:])


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle")


FILES = [
    "vision.fp32.onnx",
    "language.fp32.s12.onnx",
    "language.fp32.s24.onnx",
    "action_head.fp32.onnx",
    "token_embedding.npy",
    "golden.npz",
]


def test_an_intact_bundle_verifies(bundle: Path) -> None:
    manifest = Manifest.load(bundle)

    assert sorted(manifest.files) == sorted(FILES)
    manifest.verify(bundle)
    manifest.verify(bundle / "manifest.json")
    for name, record in manifest.files.items():
        content = (bundle / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def broken(change: str, manifest: Manifest) -> Manifest:
    """A manifest whose INT8 variant, or precision, is not what the runtime relies on."""
    variant = manifest.quantized
    assert variant is not None
    language, vision = variant.stages["language"], variant.stages["vision"]
    stages = {
        "unknown": {"hand": vision},
        "none": {"vision": msgspec.structs.replace(vision, graphs=())},
        "form": {"vision": msgspec.structs.replace(vision, graphs=vision.graphs[1:])},
        "bucket": {"language": msgspec.structs.replace(language, graphs=language.graphs[1:])},
        "bucket of a form": {"language": msgspec.structs.replace(language, graphs=language.graphs[:-1])},
        "length": {"vision": msgspec.structs.replace(vision, graphs=language.graphs)},
    }
    if change == "view":
        return manifest.int8()
    if change == "nothing":
        return msgspec.structs.replace(manifest, precision="int8", quantized=None)
    return msgspec.structs.replace(
        manifest, quantized=msgspec.structs.replace(variant, stages=variant.stages | stages[change])
    )


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ("unknown", "an INT8 stage 'hand'"),
        ("none", "no portable INT8 graph of vision"),
        ("form", "no portable INT8 graph of vision"),
        ("bucket", "no portable INT8 graph of language, bucket 12"),
        ("bucket of a form", "no ort-cpu INT8 graph of language, bucket 24"),
        ("length", "no portable INT8 graph of vision; no ort-cpu INT8 graph of vision"),
        ("view", "precision int8 of the bundle itself"),
        ("nothing", "precision int8 of the bundle itself"),
    ],
)
def test_an_int8_variant_that_cannot_be_run(bundle: Path, change: str, got: str) -> None:
    manifest = add_int8(bundle)
    manifest.verify_sizes(bundle)
    broken(change, manifest).save(bundle)
    with pytest.raises(BundleError, match="has an INT8 variant that cannot be run") as caught:
        Manifest.load(bundle).verify_sizes(bundle)
    assert caught.value.got == got
    for precision in ("auto", "int8", "float"):
        with pytest.raises(BundleError):
            Policy.load(bundle, "fake", precision=precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError) as caught:
        Manifest.load(bundle).verify(bundle)
    size = Manifest.load(bundle).files[name].bytes
    assert str(caught.value) == (
        f"{bundle / name} is missing\n  expected: {size} bytes\n\nhint: copy the whole bundle directory again."
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size(bundle: Path, name: str, change: int) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:change] if change < 0 else content + b"\0")
    with pytest.raises(BundleError, match="truncated or replaced") as caught:
        Manifest.load(bundle).verify(bundle)
    assert str(bundle / name) in caught.value.what
    assert f"{len(content) + change} bytes\n  expected: {len(content)} bytes" in str(caught.value)


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_in_any_file(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = (folder / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(changed)
    try:
        with pytest.raises(BundleError, match=r"is corrupt\n  got:      [0-9a-f]{64}(?s:.*)--force") as caught:
            Manifest.load(folder).verify(folder)
    finally:
        (folder / name).write_bytes(content)
    assert str(folder / name) in caught.value.what
    assert caught.value.got == hashlib.sha256(changed).hexdigest()


def test_of_several_damages_the_first_is_named(bundle: Path) -> None:
    for name in FILES:
        content = bytearray((bundle / name).read_bytes())
        content[-1] ^= 1
        (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match="is corrupt") as caught:
        Manifest.load(bundle).verify(bundle)
    assert str(bundle / min(FILES)) in caught.value.what


def test_files_that_are_not_the_bundles_do_not_matter(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("the one that drove well")
    Manifest.load(bundle).verify(bundle)
