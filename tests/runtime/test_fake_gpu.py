"""The fake GPU is strict: what would be undefined behaviour on a real one is an error here."""

from __future__ import annotations

import pytest

from bundle.errors import DeviceError
from runtime.backends.fake_gpu import ORIN, FakeCuda, MisuseError

pytestmark = pytest.mark.fake_gpu


def test_nothing_is_done_before_the_stream_is_synchronized() -> None:
    gpu = FakeCuda()
    stream, host, pointer = gpu.stream(), gpu.allocate_host(4, mapped=False), gpu.allocate(4)
    host.array[:] = 7
    gpu.to_device(pointer, host, stream)
    assert gpu.memory(pointer, 4).tolist() == [0xAB] * 4
    host.array[:] = 8  # too early: the copy has not run
    gpu.synchronize(stream)
    assert gpu.memory(pointer, 4).tolist() == [8] * 4


def test_mapped_memory_is_seen_from_both_sides() -> None:
    gpu = FakeCuda(ORIN)
    host = gpu.allocate_host(4, mapped=True)
    host.array[:] = 3
    assert gpu.memory(host.device_pointer, 4).tolist() == [3] * 4
    assert gpu.allocate_host(4, mapped=False).device_pointer == 0


def test_memory_must_be_alive_and_large_enough() -> None:
    gpu = FakeCuda()
    stream, pointer = gpu.stream(), gpu.allocate(4)
    with pytest.raises(MisuseError, match="not allocated"):
        gpu.memory(pointer, 5)
    gpu.zero(pointer, 4, stream)
    gpu.release(pointer)
    with pytest.raises(MisuseError, match="not allocated"):
        gpu.synchronize(stream)
    with pytest.raises(MisuseError, match="released twice"):
        gpu.release(pointer)
    host = gpu.allocate_host(4, mapped=False)
    gpu.release_host(host)
    with pytest.raises(MisuseError, match="released twice"):
        gpu.release_host(host)


def test_a_graph_runs_what_was_captured_until_it_is_released() -> None:
    gpu = FakeCuda()
    stream, pointer = gpu.stream(), gpu.allocate(4)
    gpu.begin_capture(stream)
    gpu.zero(pointer, 4, stream)
    with pytest.raises(DeviceError, match="capturing"):
        gpu.synchronize(stream)
    graph = gpu.end_capture(stream)
    gpu.synchronize(stream)
    assert gpu.memory(pointer, 4).any()  # captured, not done
    gpu.launch(graph, stream)
    gpu.synchronize(stream)
    assert not gpu.memory(pointer, 4).any()
    gpu.release_graph(graph)
    with pytest.raises(MisuseError, match="released graph"):
        gpu.launch(graph, stream)
    with pytest.raises(MisuseError, match="released twice"):
        gpu.release_graph(graph)
    with pytest.raises(MisuseError, match="without begin_capture"):
        gpu.end_capture(stream)


def test_events_are_recorded_as_what_they_are() -> None:
    gpu = FakeCuda()
    stream, first, second = gpu.stream(), gpu.event(), gpu.event()
    with pytest.raises(MisuseError, match="only inside a capture"):
        gpu.record(first, stream, captured=True)
    gpu.record(first, stream)
    gpu.record(second, stream)
    with pytest.raises(MisuseError, match="has not happened"):
        gpu.elapsed_ms(first, second)
    gpu.synchronize(stream)
    assert gpu.elapsed_ms(first, second) == 1.0


@pytest.mark.parametrize(("code", "lost"), [(700, True), (2, False)])
def test_after_a_sticky_error_nothing_works(code: int, lost: bool) -> None:
    gpu = FakeCuda(fail={"allocate": (1, code)})
    gpu.allocate(4)
    with pytest.raises(DeviceError) as caught:
        gpu.allocate(4)
    assert caught.value.sticky == lost
    if lost:
        with pytest.raises(DeviceError):
            gpu.stream()
    else:
        gpu.allocate(4)
    gpu.abandon_capture(FakeCuda().stream())  # never raises
