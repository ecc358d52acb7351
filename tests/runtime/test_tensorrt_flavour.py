"""How TensorRT's versions differ: each question that is asked of the module, against small modules that have or lack it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bundle.errors import EngineError
from bundle.manifest import Tensor
from runtime import tensorrt_flavour
from runtime.backends.fake_gpu import DESKTOP, ORIN
from runtime.backends.fake_tensorrt import VERSIONS, DataType, fake_module
from runtime.gpu import Device
from runtime.tensorrt_callbacks import MessageLog
from runtime.tensorrt_flavour import EngineTensor, TensorRT, installed, open_flavour


def flavour(version: str = "10.3.0", **attributes: Any) -> TensorRT:
    module = fake_module(version)
    for name, value in attributes.items():
        setattr(module, name, value)
    return TensorRT(module, "rtx" if version.startswith("rtx") else "trt")


# --- what it can do -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "rtx"), [("10.3.0", False), ("10.16.1", False), ("11.4.0", False), ("rtx-1.7.1", True)]
)
def test_questions(version: str, rtx: bool) -> None:
    tensorrt = flavour(version)
    assert (tensorrt.builds_for_others, tensorrt.wants_scratch, bool(tensorrt.targets())) == (rtx, rtx, rtx)


@pytest.mark.parametrize("version", ["8.6.1", "8.6.2.3", "9.3.0.post12.dev1"])
def test_a_tensorrt_that_cannot_be_told_exact_types(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(
        tensorrt_flavour.importlib, "import_module", lambda name: SimpleNamespace(__version__=version, ILogger=object)
    )
    with pytest.raises(EngineError, match="too old for exact engines") as caught:
        open_flavour("trt")
    assert f"got:      TensorRT {version}\n  expected: 10.0 or newer" in str(caught.value)
    assert "JetPack 6.1 or newer" in caught.value.hint
    assert "--backend ort" in caught.value.hint
    assert not caught.value.absent  # a search for a backend says why it goes on


def test_rtx_counts_its_versions_from_one() -> None:
    assert flavour("rtx-1.7.1").version == "1.7.1"


def test_fingerprints() -> None:
    assert flavour("10.3.0").fingerprint(ORIN) == "orin-sm87x8-trt10.3.0-cuda12"
    assert flavour("10.3.0").fingerprint(Device("Orin", 87, 16, 1, True, 12060)) == "orin-sm87x16-trt10.3.0-cuda12"
    assert flavour("10.3.0").usable_fingerprints(ORIN) == ("orin-sm87x8-trt10.3.0-cuda12",)
    with pytest.raises(EngineError, match="builds for the GPU that it runs on"):
        flavour("10.3.0").fingerprint(None)
    rtx = flavour("rtx-1.7.1")
    assert rtx.fingerprint(DESKTOP) == "sm86-rtx1.7.1"
    assert rtx.fingerprint(DESKTOP, "sm120") == "sm120-rtx1.7.1"
    assert rtx.fingerprint(None) == "portable-rtx1.7.1"
    assert rtx.usable_fingerprints(DESKTOP) == ("sm86-rtx1.7.1", "portable-rtx1.7.1")
    assert rtx.usable_fingerprints(Device("T4", 75, 40, 1, False, 13000)) == ("sm75-rtx1.7.1",)


@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes(version: str) -> None:
    names = [flavour(version).dtype(value) for value in (DataType.FLOAT, DataType.HALF, DataType.INT64, DataType.UINT8)]
    assert names == ["float32", "float16", "int64", "uint8"]
    assert flavour(version).dtype("FP4") == "FP4"


# --- building -----------------------------------------------------------------------------------------------------------------


def test_a_network_of_a_tensorrt_that_has_nothing_but_strong_types() -> None:
    tensorrt = flavour("11.4.0", NetworkDefinitionCreationFlag=SimpleNamespace())
    assert tensorrt.network(tensorrt.builder())._creation == 0


def test_targets_are_set() -> None:
    tensorrt, told = flavour("rtx-1.7.1"), []
    config = SimpleNamespace(set_compute_capability=lambda *arguments: told.append(arguments))
    tensorrt.set_target(config, "portable")
    assert told == []
    tensorrt.set_target(config, "sm89")
    assert (config.num_compute_capabilities, told) == (1, [(89, 0)])


@pytest.mark.parametrize("refused_by", ["create", "set"])
def test_a_timing_cache_of_another_machine_is_begun_anew(refused_by: str) -> None:
    asked: list[Any] = []
    config = SimpleNamespace(
        create_timing_cache=lambda content: (
            asked.append(content) or (None if content and refused_by == "create" else content)
        ),
        set_timing_cache=lambda cache, ignore: asked.append((cache, ignore)) or not cache,
    )
    assert flavour().set_timing_cache(config, b"of a Xavier")
    tried = [] if refused_by == "create" else [(b"of a Xavier", False)]
    assert asked == [b"of a Xavier", *tried, b"", (b"", False)]


def test_a_timing_cache_that_is_refused_or_deprecated() -> None:
    def deprecated(content: bytes) -> bytes:
        warnings.warn("measures nothing", DeprecationWarning, stacklevel=2)
        return content

    refused = SimpleNamespace(create_timing_cache=bytes, set_timing_cache=lambda *_: False)
    useless = SimpleNamespace(create_timing_cache=deprecated, set_timing_cache=lambda *_: True)
    for config in (refused, useless):
        assert not flavour().set_timing_cache(config, b"")


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    tensorrt = flavour()
    assert not tensorrt.build(SimpleNamespace(build_serialized_network=lambda *_: None), None, None, path)
    assert not path.exists()
    assert tensorrt.build(SimpleNamespace(build_serialized_network=lambda *_: b"plan"), None, None, path)
    assert path.read_bytes() == b"plan"


def test_a_plan_is_streamed(tmp_path: Path) -> None:
    def to_stream(network: Any, config: Any, writer: Any) -> bool:
        return [writer.write(part) for part in (b"pl", b"an")] == [2, 2]

    builder = SimpleNamespace(build_serialized_network_to_stream=to_stream)
    assert flavour("rtx-1.7.1").build(builder, None, None, tmp_path / "x.engine")
    assert (tmp_path / "x.engine").read_bytes() == b"plan"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_though_tensorrt_calls_it_a_success() -> None:
    def to_stream(network: Any, config: Any, writer: Any) -> bool:
        writer.write(b"x" * (1 << 20))
        assert writer.write(b"more") == 0
        return True

    builder = SimpleNamespace(build_serialized_network_to_stream=to_stream)
    with pytest.raises(OSError, match="No space left"):
        flavour("rtx-1.7.1").build(builder, None, None, Path("/dev/full"))


# --- loading and running ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reasons", "words"), [(32, "MALFORMED_ENGINE"), (33, "VERSION_MISMATCH"), (64, "reason 64")])
def test_a_refused_engine_is_explained(reasons: int, words: str) -> None:
    tensorrt = flavour("rtx-1.7.1")

    def refuse(content: Any) -> None:
        tensorrt.logger.log(1, "magic tag failed")

    runtime = SimpleNamespace(
        get_engine_validity=lambda content: (tensorrt.module.EngineValidity.INVALID, reasons),
        deserialize_cuda_engine=refuse,
    )
    with pytest.raises(EngineError, match=r"cannot load vision\.engine") as caught:
        tensorrt.deserialize(runtime, b"", "vision.engine")
    assert words in str(caught.value.got)
    assert "magic tag failed" in str(caught.value.got)


def test_a_suboptimal_engine_is_loaded() -> None:
    tensorrt = flavour("rtx-1.7.1")
    runtime = SimpleNamespace(
        get_engine_validity=lambda content: (tensorrt.module.EngineValidity.SUBOPTIMAL, 0),
        deserialize_cuda_engine=lambda content: "engine",
    )
    assert tensorrt.deserialize(runtime, b"", "x") == "engine"


@pytest.mark.parametrize("cache", [b"", b"compiled before"])
def test_a_context_takes_what_was_compiled_before(cache: bytes) -> None:
    told: list[Any] = []
    compiled = SimpleNamespace(deserialize=told.append)
    config = SimpleNamespace(
        create_runtime_cache=lambda: compiled,
        set_runtime_cache=told.append,
        set_execution_context_allocation_strategy=lambda strategy: told.append(strategy.name),
    )
    engine = SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=lambda *given: given)
    assert flavour("rtx-1.7.1").context(engine, cache) == ((config,), compiled)
    assert told == ["USER_MANAGED", *([cache] if cache else []), compiled]


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.4.0"])
def test_a_context_without_a_runtime_cache(version: str) -> None:
    """JetPack 7's has a runtime configuration, but nothing is compiled at loading."""
    engine = SimpleNamespace(create_runtime_config=SimpleNamespace, create_execution_context=lambda *given: given)
    assert flavour(version).context(engine, b"x") == ((), None)
    assert flavour(version).scratch_bytes(engine) == 0


FEED, RESULT = Tensor(name="a", dtype="float16", shape=(1, 2)), Tensor(name="b", dtype="int32", shape=(3,))


def test_tensors_by_name() -> None:
    tensorrt = flavour()
    mode = tensorrt.module.TensorIOMode
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda index: "ab"[index],
        get_tensor_mode=lambda name: mode.INPUT if name == "a" else mode.OUTPUT,
        get_tensor_dtype={"a": DataType.HALF, "b": DataType.INT32}.get,
        get_tensor_shape={"a": (1, 2), "b": (3,)}.get,
    )
    assert tensorrt.tensors(engine) == (EngineTensor(FEED, True), EngineTensor(RESULT, False))
    told: list[Any] = []
    context = SimpleNamespace(
        set_tensor_address=lambda name, pointer: told.append((name, pointer)) or True,
        execute_async_v3=lambda stream: stream == 7,
    )
    run = tensorrt.bind(context, {"a": 11, "b": 22})
    assert told == [("a", 11), ("b", 22)]
    assert run(7)
    assert not run(8)


def test_an_address_that_is_refused() -> None:
    context = SimpleNamespace(set_tensor_address=lambda *_: False, execute_async_v3=lambda stream: True)
    with pytest.raises(EngineError, match="does not take the buffer of a"):
        flavour().bind(context, {"a": 1})


def test_capturable() -> None:
    assert flavour().capturable(SimpleNamespace(), 1)
    assert not flavour().capturable(SimpleNamespace(is_stream_capturable=lambda stream: False), 1)


@pytest.mark.parametrize(
    ("parses", "missing", "done", "result"),
    [(True, [], True, True), (False, [], True, False), (True, ["w"], True, False), (True, [], False, False)],
)
def test_refit(parses: bool, missing: list[str], done: bool, result: bool) -> None:
    refitter = SimpleNamespace(get_missing_weights=lambda: missing, refit_cuda_engine=lambda: done)
    parser = SimpleNamespace(refit_from_file=lambda path: parses)
    tensorrt = flavour(Refitter=lambda *_: refitter, OnnxParserRefitter=lambda *_: parser)
    assert tensorrt.refit("engine", Path("x.onnx")) == result


# --- messages and installation ------------------------------------------------------------------------------------------------


def test_the_log_keeps_the_last_messages_and_tells_an_error_once() -> None:
    log = MessageLog()
    assert log.errors() == "TensorRT gave no reason"
    for severity, text in ((4, "verbose"), (2, "a warning"), (1, " cause "), (0, "effect"), (1, "cause")):
        log.add(severity, text)
    assert log.errors() == "cause; effect"
    assert all(severity < 4 for severity, _ in log.messages)
    for number in range(300):
        log.add(3, str(number))
    assert (len(log.messages), log.messages[-1]) == (200, (3, "299"))


def test_an_engine_of_another_device_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    words = "Using an engine plan file across different models of devices is not recommended and is likely to affect performance."
    log = MessageLog()
    for severity, text in ((2, words), (2, f"{words}\n"), (2, "the timing cache is empty"), (3, f"{words} INFO")):
        log.add(severity, text)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, f"TensorRT: {words}")
    ]


def test_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in ({"tensorrt", "tensorrt_rtx"}, {"tensorrt_rtx"}, set()):
        monkeypatch.setattr(
            tensorrt_flavour.importlib.util, "find_spec", lambda name, here=present: name if name in here else None
        )
        assert list(installed()) == [name for name, module in tensorrt_flavour.MODULES.items() if module in present]


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("no file"), RuntimeError("driver")])
def test_a_flavour_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(name: str) -> Any:
        raise error

    monkeypatch.setattr(tensorrt_flavour.importlib, "import_module", refuse)
    with pytest.raises(EngineError, match="tensorrt cannot be imported") as caught:
        open_flavour("trt")
    assert str(error) in str(caught.value)
    assert "system-site-packages" in caught.value.hint


@pytest.mark.parametrize("library", ["libnvinfer.so.10", "libnvonnxparser.so.10"])
def test_bindings_without_libraries(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"{library}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(tensorrt_flavour.importlib, "import_module", refuse)
    with pytest.raises(EngineError, match="tensorrt cannot be imported") as caught:
        open_flavour("trt")
    assert f"{library} is not" in caught.value.hint
    assert all(way in caught.value.hint for way in ("apt-get", "--runtime nvidia", "--backend ort"))


@pytest.mark.parametrize("start", ["builder", "runtime"])
def test_what_does_not_start(start: str) -> None:
    """pybind11 has no word for a constructor that returns nothing but TypeError."""

    def nothing(logger: Any) -> Any:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    tensorrt = flavour(Builder=nothing, Runtime=nothing)
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 does not start(?s:.*)error: 35") as caught:
        getattr(tensorrt, start)()
    assert all(way in caught.value.hint for way in ("driver is too old", "--backend ort"))


def test_the_real_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    tensorrt = open_flavour("rtx")
    module = sys.modules["tensorrt_rtx"]
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(tensorrt.targets())
    assert tensorrt.fingerprint(DESKTOP) == f"sm86-rtx{module.__version__}"
    assert tensorrt.fingerprint(None) == f"portable-rtx{module.__version__}"
    assert (tensorrt.builds_for_others, tensorrt.wants_scratch) == (True, True)
    assert tensorrt.dtype(module.DataType.HALF) == "float16"
    bits = module.EngineInvalidityDiagnostics.MALFORMED_ENGINE
    assert tensorrt._diagnosis(int(bits)) == "MALFORMED_ENGINE"
