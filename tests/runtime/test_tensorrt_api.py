"""NVIDIA's Python API, version by version: what jetvla touches is there, and the fakes offer nothing else.

The records beside this file are made by scripts/record_tensorrt_api of NVIDIA's own bindings. With JETVLA_TENSORRT_WHEELS=FOLDER (the
script fills one) the bindings themselves are imported, over stubs in C.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.backends.fake_tensorrt import VERSIONS, fake_module
from tests.tensorrt_bindings import (
    REFUSED,
    RELEASES,
    ROOT,
    WHEELS_VARIABLE,
    Api,
    find_wheel,
    make_importable,
    missing_tool,
    records,
)

RECORDS = records()
# What is called, or asked for, whatever the version; and what is called only where the name before it is found.
_ALWAYS = """
Builder Builder.build_serialized_network Builder.create_builder_config Builder.create_network
BuilderFlag.REFIT BuilderFlag.TF32
DataType.FLOAT DataType.HALF DataType.BF16 DataType.INT64 DataType.INT32 DataType.INT8 DataType.UINT8 DataType.BOOL
EngineInspector.get_engine_information LayerInformationFormat.JSON
IBuilderConfig.builder_optimization_level IBuilderConfig.clear_flag IBuilderConfig.create_timing_cache
IBuilderConfig.get_timing_cache IBuilderConfig.profiling_verbosity IBuilderConfig.progress_monitor IBuilderConfig.set_flag
IBuilderConfig.set_memory_pool_limit IBuilderConfig.set_timing_cache ITimingCache.serialize
ICudaEngine.create_engine_inspector ICudaEngine.create_execution_context ICudaEngine.get_tensor_dtype ICudaEngine.get_tensor_mode
ICudaEngine.get_tensor_name ICudaEngine.get_tensor_shape ICudaEngine.num_io_tensors ICudaEngine.serialize
IExecutionContext.execute_async_v3 IExecutionContext.set_tensor_address
ILogger ILogger.log
INetworkDefinition.get_input INetworkDefinition.get_output INetworkDefinition.num_inputs INetworkDefinition.num_layers
INetworkDefinition.num_outputs ITensor.dtype ITensor.name ITensor.shape
IProgressMonitor IProgressMonitor.phase_finish IProgressMonitor.phase_start IProgressMonitor.step_complete
MemoryPoolType.WORKSPACE ProfilingVerbosity.DETAILED TensorIOMode.INPUT
OnnxParser OnnxParser.get_error OnnxParser.num_errors OnnxParser.parse_from_file
OnnxParserRefitter OnnxParserRefitter.refit_from_file Refitter Refitter.get_missing_weights Refitter.refit_cuda_engine
ParserError.code ParserError.desc ParserError.node ParserError.node_name ParserError.node_operator
Runtime Runtime.deserialize_cuda_engine
"""
WHERE_FOUND = {
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "NetworkDefinitionCreationFlag",
    "Builder.build_serialized_network_to_stream": "IStreamWriter IStreamWriter.write",
    "IBuilderConfig.set_compute_capability": "ComputeCapability IBuilderConfig.num_compute_capabilities",
    "BuilderFlag.REQUIRE_USER_ALLOCATION": "ExecutionContextAllocationStrategy.USER_MANAGED ICudaEngine.device_memory_size_v2 "
    "IExecutionContext.set_device_memory IRuntimeConfig.set_execution_context_allocation_strategy IRuntimeCache",
    "IRuntimeCache": "ICudaEngine.create_runtime_config IRuntimeConfig.create_runtime_cache IRuntimeConfig.set_runtime_cache "
    "IRuntimeCache.deserialize IRuntimeCache.serialize",
    "Runtime.get_engine_validity": "EngineValidity.INVALID EngineInvalidityDiagnostics",
    "IExecutionContext.is_stream_capturable": "IExecutionContext",
}
ALWAYS = _ALWAYS.split()
TOUCHED = {*ALWAYS, *WHERE_FOUND, *" ".join(WHERE_FOUND.values()).split()}
SOURCES = (
    "runtime/tensorrt_flavour.py",
    "runtime/tensorrt_callbacks.py",
    "runtime/backends/trt_engine.py",
    "export/to_tensorrt.py",
)
# Words of ours that happen to be names of theirs.
OURS = {"__init__", "builder", "engine", "file", "logger"}


def has(api: Api, name: str) -> bool:
    kind, _, member = name.partition(".")
    found = api["classes"].get(kind)
    return found is not None and (not member or any(member in part for part in found.values()))


def record_of(version: str) -> Api:
    """Of the version that a fake stands for."""
    stem = f"tensorrt_rtx-{version[4:]}" if version.startswith("rtx-") else f"tensorrt-{version}"
    [found] = [api for name, api in RECORDS.items() if name == stem or name.startswith(f"{stem}.")]
    return found


# --- what jetvla touches ------------------------------------------------------------------------------------------------------


def test_every_release_is_recorded() -> None:
    wanted = {f"tensorrt-{requirement.partition('==')[2]}" for requirement in RELEASES}
    assert {name for name in RECORDS if name.startswith("tensorrt-")} == wanted
    assert [name for name in RECORDS if name.startswith("tensorrt_rtx-")]


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_touched_exists(name: str) -> None:
    api = RECORDS[name]
    wanted = list(ALWAYS)
    for probe, needed in WHERE_FOUND.items():
        wanted += needed.split() if has(api, probe) else []
    assert [each for each in wanted if not has(api, each)] == []


@pytest.mark.parametrize("name", RECORDS)
def test_which_branch_a_version_takes(name: str) -> None:
    module, _, version = name.partition("-")
    rtx = module == "tensorrt_rtx"
    streams = rtx or tuple(int(number) for number in version.split(".")[:2]) >= (10, 13)
    found = {probe for probe in WHERE_FOUND if has(RECORDS[name], probe)}
    only_rtx = set(WHERE_FOUND) - {
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "Builder.build_serialized_network_to_stream",
    }
    expected = {"NetworkDefinitionCreationFlag.STRONGLY_TYPED"}
    expected |= {"Builder.build_serialized_network_to_stream"} if streams else set()
    assert found == expected | (only_rtx if rtx else set())


def names_in(source: Path) -> Iterator[str]:
    """Attributes that a module reads or sets, and those that it asks for by name."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


@pytest.mark.parametrize("source", SOURCES)
def test_the_table_of_what_is_touched_is_complete(source: str) -> None:
    theirs = {
        member
        for api in RECORDS.values()
        for kind in api["classes"].values()
        for part in kind.values()
        for member in part
    } | {name for api in RECORDS.values() for name in api["classes"]}
    listed = {part for name in TOUCHED for part in name.split(".")}
    assert {name for name in names_in(ROOT / source) if name in theirs} - listed - OURS == set()


def test_the_methods_that_are_called_back_take_what_theirs_take() -> None:
    """But for IStreamWriter.write, which is declared with a pointer and a size, and called with bytes."""
    for name, api in RECORDS.items():
        for member, count in (("phase_start", 3), ("step_complete", 2), ("phase_finish", 1)):
            assert api["classes"]["IProgressMonitor"]["methods"][member] == [[count, count]], name
        assert api["classes"]["ILogger"]["methods"]["log"] == [[2, 2]], name


# --- what the fakes offer -----------------------------------------------------------------------------------------------------


def fake_classes(version: str) -> dict[str, Any]:
    return {name: kind for name, kind in vars(fake_module(version)).items() if isinstance(kind, type)}


def offered(kind: Any) -> dict[str, Any]:
    """Public members of a fake's class, without those that this version lacks."""
    fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    members = {name: getattr(kind, name) for name in dir(kind) if hasattr(kind, name) and not name.startswith("_")}
    return {**fields, **members}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fake_offers_nothing_else(version: str) -> None:
    api, extra = record_of(version)["classes"], []
    for name, kind in fake_classes(version).items():
        if issubclass(kind, enum.Enum):
            theirs = api.get(name, {}).get("values", {})
            extra += [
                f"{name}.{member}" for member, value in kind.__members__.items() if theirs.get(member) != value.value
            ]
            continue
        known = {**api.get(name, {})}
        for member, value in offered(kind).items():
            if isinstance(value, type):
                continue  # ILogger.Severity
            part = "methods" if inspect.isfunction(value) else "attributes"
            if member not in known.get(part, {}):
                extra.append(f"{name}.{member}")
            elif part == "methods" and known[part][member] and not _fits(value, known[part][member]):
                extra.append(f"{name}.{member}{inspect.signature(value)}")
    assert extra == []
    with pytest.raises(AttributeError, match="has no max_workspace_size"):
        fake_module(version).IBuilderConfig().max_workspace_size = 1


def _fits(method: Any, overloads: list[list[int]]) -> bool:
    """One of the overloads takes every number of arguments that the fake takes."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    least = sum(parameter.default is parameter.empty for parameter in parameters)
    return any(fewest <= least and len(parameters) <= most for fewest, most in overloads)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fake_has_what_is_touched_as_its_version_has_it(version: str) -> None:
    """Otherwise its tests would take another branch than the version does."""
    module, api = fake_module(version), record_of(version)
    called_back = {"IProgressMonitor", "IStreamWriter"}  # their methods are ours
    differing = []
    for name in sorted(TOUCHED):
        kind, _, member = name.partition(".")
        if (member and kind in called_back) or (kind == "DataType" and member == "BF16"):  # which no graph of ours has
            continue
        found = getattr(module, kind, None)
        there = found is not None and (
            not member or member in offered(found) or member in getattr(found, "__members__", {})
        )
        if there != has(api, name):
            differing.append(name)
    assert differing == []


def test_error_codes_hide_their_name_in_the_same_versions() -> None:
    for version in VERSIONS:
        is_method = "name" in record_of(version)["classes"]["ErrorCode"].get("methods", {})
        code = fake_module(version).ErrorCode(8)
        assert callable(code.name) == is_method
        assert str(code).endswith(".UNSUPPORTED_NODE")


# --- the bindings themselves --------------------------------------------------------------------------------------------------

WITHOUT_LIBRARIES = """
from bundle.errors import EngineError
from runtime import tensorrt_callbacks
from runtime.tensorrt_flavour import open_flavour
from export.to_tensorrt import EngineRequest, build_engine
from tests.tensorrt_bindings import describe
import json, sys

tensorrt = open_flavour("trt")
module = tensorrt.module
tensorrt.logger.log(module.ILogger.WARNING, "heard")
assert tensorrt.log.messages == [(2, "heard")], tensorrt.log.messages
seen = []
monitor = tensorrt_callbacks.make_monitor(module, lambda *report: seen.append(report) or True)
assert isinstance(monitor, module.IProgressMonitor)
monitor.phase_start("a", None, 2)
assert monitor.step_complete("a", 0)
monitor.phase_finish("a")
assert seen == [("a", None, 0, 2), ("a", None, 1, 2), ("a", None, 2, 2)], seen
if hasattr(module, "IStreamWriter"):
    writer = tensorrt_callbacks.make_writer(module, len)
    assert isinstance(writer, module.IStreamWriter)
    assert writer.write(b"abc") == 3
assert {tensorrt.dtype(getattr(module.DataType, name)) for name in ("HALF", "INT64")} == {"float16", "int64"}
assert str(module.ErrorCode.UNSUPPORTED_NODE).rpartition(".")[2] == "UNSUPPORTED_NODE"
path = sys.argv[1]
request = EngineRequest(
    flavour="trt", label="vision", graph=path, output=path, layers_output=path, target=None, optimization_level=3,
    workspace_bytes=1, refit=False, timing_cache=None,
)
for start in (lambda: build_engine(tensorrt, request, lambda *_: True), tensorrt.runtime):
    try:
        start()
    except EngineError as error:
        assert "does not start" in error.what and "driver is too old" in error.hint, error
    else:
        raise AssertionError("stubs gave a builder")
json.dump(describe(module), sys.stdout)
"""


def bindings(requirement: str, folder: Path) -> dict[str, str]:
    """The environment in which a release can be imported; skips if that cannot be had here."""
    if WHEELS_VARIABLE not in os.environ:
        pytest.skip(f"{WHEELS_VARIABLE} names no folder of wheels: scripts/record_tensorrt_api FOLDER fills one")
    if missing_tool() is not None:
        pytest.skip(f"no {missing_tool()}")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel = find_wheel(Path(os.environ[WHEELS_VARIABLE]), requirement)
    if wheel is None or tag not in wheel.name:
        pytest.skip(f"no wheel of {requirement} for {tag}")
    return make_importable(wheel, folder)


def run(program: str, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("requirement", RELEASES)
def test_nvidias_own_bindings_without_their_libraries(requirement: str, tmp_path: Path) -> None:
    done = run(WITHOUT_LIBRARIES, bindings(requirement, tmp_path), tmp_path / "x")
    assert done.returncode == 0, done.stderr
    recorded = RECORDS[f"tensorrt-{requirement.partition('==')[2]}"]
    assert ast.literal_eval(done.stdout) == recorded  # the record is what it was made of


def test_nvidias_own_bindings_of_jetpack_6_0_are_refused(tmp_path: Path) -> None:
    program = 'from runtime.tensorrt_flavour import open_flavour\nopen_flavour("trt")'
    done = run(program, bindings(REFUSED, tmp_path))
    assert "EngineError: this TensorRT is too old for exact engines\n  got:      TensorRT 8.6.1\n" in done.stderr


def test_nvidias_own_bindings_without_even_stubs(tmp_path: Path) -> None:
    environment = bindings(RELEASES[1], tmp_path)
    del environment["LD_LIBRARY_PATH"]
    program = 'from runtime.tensorrt_flavour import open_flavour\nopen_flavour("trt")'
    done = run(program, environment)
    assert "EngineError: tensorrt cannot be imported" in done.stderr
    assert "libnvinfer.so.10 is not" in done.stderr or "libnvonnxparser.so.10 is not" in done.stderr


def test_the_installed_tensorrt_rtx_is_the_recorded_one() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    recorded = RECORDS.get(f"tensorrt_rtx-{module.__version__}")
    if recorded is None:
        pytest.skip(f"TensorRT-RTX {module.__version__} is not recorded")
    from tests.tensorrt_bindings import describe

    assert describe(module) == recorded
