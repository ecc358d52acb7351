"""Messages, against rosbags, which has its own description of them and its own CDR."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rosbags.typesys import Stores, get_typestore

from bundle.errors import CameraError, FrameError
from runtime.cameras.ros_cdr import read_compressed_image, read_image
from runtime.cameras.ros_image import frame_of, raw_pixels, stamp_s
from runtime.cameras.source_clock import SourceClock
from runtime.robot_file import Ros2TopicCamera

ROS = get_typestore(Stores.ROS2_HUMBLE)
Time = ROS.types["builtin_interfaces/msg/Time"]
Header = ROS.types["std_msgs/msg/Header"]
RosImage = ROS.types["sensor_msgs/msg/Image"]
RosCompressed = ROS.types["sensor_msgs/msg/CompressedImage"]
RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = np.full((5, 7, 1), 99, np.uint8)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
octets = st.binary(max_size=60)
times = st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1))


def message(pixels: NDArray[np.uint8], encoding: str, padding: int = 0, **changes: object) -> SimpleNamespace:
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    rows = np.concatenate([rows, np.full((height, padding), 77, np.uint8)], axis=1)
    fields = {
        "header": SimpleNamespace(stamp=SimpleNamespace(sec=3, nanosec=500_000_000), frame_id=""),
        "height": height,
        "width": width,
        "encoding": encoding,
        "step": rows.shape[1],
        "data": rows.tobytes(),
    }
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("pixels", "encoding", "order"),
    [
        (PICTURE, "rgb8", "rgb"),
        (PICTURE[..., ::-1], "bgr8", "bgr"),
        (np.concatenate([PICTURE, ALPHA], axis=2), "rgba8", "rgb"),
        (np.concatenate([PICTURE[..., ::-1], ALPHA], axis=2), "bgra8", "bgr"),
    ],
)
def test_encodings(pixels: NDArray[np.uint8], encoding: str, order: str, padding: int) -> None:
    config = Ros2TopicCamera(topic="/x", message="image", colour_order=order)  # type: ignore[arg-type]

    frame = frame_of(message(pixels, encoding, padding), config, "/x", SourceClock(), 9.0)

    assert np.array_equal(frame.pixels, PICTURE)
    assert (frame.captured_s, frame.source_stamp_s) == (9.0, 3.5)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_grey_fits_any_colour_order(order: str) -> None:
    grey = PICTURE[..., :1]
    assert np.array_equal(raw_pixels(message(grey, "mono8", 2), order, "/x"), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize(("encoding", "order"), [("bgr8", "rgb"), ("rgb8", "bgr"), ("bgra8", "rgb"), ("rgba8", "bgr")])
def test_a_colour_order_that_the_message_contradicts_is_an_error(encoding: str, order: str) -> None:
    pixels = np.concatenate([PICTURE, ALPHA], axis=2) if "a" in encoding else PICTURE
    pattern = rf'(?s)/cam.*got: +{encoding}.*expected: {order}8.*colour_order = "{encoding[:3]}"'
    with pytest.raises(CameraError, match=pattern):
        raw_pixels(message(pixels, encoding), order, "/cam")


@pytest.mark.parametrize("encoding", ["yuv422", "16UC1", "", "rgb16", "8UC3"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(CameraError, match="encoding that is not read here"):
        raw_pixels(message(PICTURE, encoding), "rgb", "/cam")


@pytest.mark.parametrize(
    "changes",
    [{"height": 0}, {"width": 8}, {"height": 6}, {"step": 20}, {"data": b""}, {"height": 10**6, "width": 10**6}],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FrameError, match="do not fit each other"):
        raw_pixels(message(PICTURE, "rgb8", **changes), "rgb", "/cam")


def test_a_stamp_that_nobody_set_is_none() -> None:
    assert stamp_s(SimpleNamespace(sec=0, nanosec=0)) is None


def test_compressed() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0))
    config = Ros2TopicCamera(topic="/x", message="compressed", colour_order="rgb")
    sent = SimpleNamespace(header=header, format="rgb8; png compressed bgr8", data=buffer.getvalue())

    frame = frame_of(sent, config, "/x", SourceClock(), 9.0)

    assert np.array_equal(frame.pixels, PICTURE)
    assert frame.source_stamp_s is None


GREYS = np.repeat(PICTURE[..., :1], 3, axis=2)


def compressed(form: str, pixels: NDArray[np.uint8], file: str = "PNG") -> NDArray[np.uint8]:
    """What becomes of a file that shows `pixels` and goes by that `format`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file)
    return frame_of(_compressed(form, buffer.getvalue()), COMPRESSED, "/x", SourceClock(), 9.0).pixels


def _compressed(form: str, data: bytes) -> SimpleNamespace:
    return SimpleNamespace(header=SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0)), format=form, data=data)


COMPRESSED = Ros2TopicCamera(topic="/x", message="compressed", colour_order="rgb")


@pytest.mark.parametrize(
    "form",
    ["", "jpeg", "png", "jpg", "bgr8", "yuv422_yuy2; jpeg compressed bgr8", "bayer_rggb8; png compressed bgr8"]
    + [
        f"{encoding}; png compressed {order}"
        for encoding in ("rgb8", "bgr8", "rgba8", "bgra8")
        for order in ("bgr8", "bgra8")
    ],
)
def test_files_of_the_usual_order_show_what_they_show(form: str) -> None:
    assert np.array_equal(compressed(form, PICTURE), PICTURE)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
@pytest.mark.parametrize("order", ["", "rgb8", "rgba8"])
def test_files_with_red_and_blue_exchanged_are_put_right_as_ros_does(encoding: str, order: str) -> None:
    assert np.array_equal(compressed(f"{encoding}; png compressed {order}", PICTURE), PICTURE[..., ::-1])


@given(
    st.sampled_from(["rgb8", "bgr8", "rgba8", "bgra8", "mono8"]),
    st.sampled_from(["", "bgr8", "bgra8", "rgb8", "rgba8", "mono8"]),
)
def test_formats_against_the_rules_of_compressed_image_transport_in_opencv(encoding: str, order: str) -> None:
    """Its subscriber decodes, converts by `format`, and labels the result with the encoding, from which cv_bridge makes rgb8."""
    cv2 = pytest.importorskip("cv2")
    pixels = GREYS[..., 0] if encoding == "mono8" else PICTURE
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = cv2.imdecode(np.frombuffer(buffer.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)
    as_bgr = f"compressed {order}".startswith("compressed bgr")
    code = {
        (True, "rgb8"): "BGR2RGB",
        (True, "rgba8"): "BGR2RGBA",
        (True, "bgra8"): "BGR2BGRA",
        (False, "bgr8"): "RGB2BGR",
        (False, "bgra8"): "RGB2BGRA",
        (False, "rgba8"): "RGB2RGBA",
    }.get((as_bgr, encoding))
    labelled = image if code is None else cv2.cvtColor(image, getattr(cv2, f"COLOR_{code}"))
    to_rgb = {"bgr8": "BGR2RGB", "rgba8": "RGBA2RGB", "bgra8": "BGRA2RGB", "mono8": "GRAY2RGB"}.get(encoding)
    want = labelled if to_rgb is None else cv2.cvtColor(labelled, getattr(cv2, f"COLOR_{to_rgb}"))

    assert np.array_equal(compressed(f"{encoding}; png compressed {order}", pixels), want)


@pytest.mark.parametrize(
    "form", ["mono8; jpeg compressed ", "mono8; png compressed", "jpeg", "bgr8; jpeg compressed bgr8"]
)
def test_compressed_greys(form: str) -> None:
    assert np.array_equal(compressed(form, GREYS[..., 0]), GREYS)


@pytest.mark.parametrize(
    ("form", "pixels"),
    [
        *[
            (f"{name}; jpeg compressed ", GREYS)
            for name in ("bayer_rggb8", "bayer_gbrg8", "mono16", "16UC1", "32FC1", "8UC1", "8UC3", "RGB8", "jpeg")
        ],
        ("bayer_rggb8; jpeg compressed bgr8", GREYS),
        ("mono8; jpeg compressed ", PICTURE),
        ("rgb16; png compressed bgr16", PICTURE),
        ("16UC1; compressedDepth png", GREYS),
        ("16UC1; compressedDepth", GREYS),
    ],
)
def test_what_is_no_8_bit_picture_of_colours_or_greys_is_refused_by_name(form: str, pixels: NDArray[np.uint8]) -> None:
    """A Bayer pattern in a grey JPEG looks like a picture, and depth cut to 8 bits like a grey one."""
    with pytest.raises(
        CameraError, match=f"(?s)/x has a format that is not read here.*{form.partition(';')[0]}.*image_proc"
    ):
        compressed(form, pixels)


@pytest.mark.parametrize("form", ["h264", "rgb8; tiff compressed ", "webp"])
def test_other_compressions_are_named(form: str) -> None:
    with pytest.raises(CameraError, match=f"(?s)format that is not read.*{form}"):
        frame_of(_compressed(form, b"\0\0\0\1gh264"), COMPRESSED, "/x", SourceClock(), 9.0)


def test_a_damaged_picture_of_a_right_format_is_a_glitch() -> None:
    with pytest.raises(FrameError, match="cannot be used"):
        frame_of(_compressed("jpeg", b"\xff\xd8\xff"), COMPRESSED, "/x", SourceClock(), 9.0)


@given(texts)
def test_any_format_is_read_or_refused(form: str) -> None:
    try:
        shown = compressed(form, PICTURE)
    except (CameraError, FrameError):
        return
    assert np.array_equal(shown, PICTURE)


@given(
    time=times,
    frame_id=texts,
    size=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
    encoding=texts,
    data=octets,
    little=st.booleans(),
)
def test_images_as_rosbags_writes_them(
    time: tuple[int, int], frame_id: str, size: tuple[int, int, int], encoding: str, data: bytes, little: bool
) -> None:
    height, width, step = size
    header = Header(stamp=Time(*time), frame_id=frame_id)
    sent = RosImage(header, height, width, encoding, 0, step, np.frombuffer(data, np.uint8))

    read = read_image(bytes(ROS.serialize_cdr(sent, "sensor_msgs/msg/Image", little_endian=little)))

    assert (read.height, read.width, read.step, read.encoding) == (height, width, step, encoding)
    assert (read.header.stamp.sec, read.header.stamp.nanosec, read.header.frame_id) == (*time, frame_id)
    assert bytes(read.data) == data


@given(time=times, frame_id=texts, form=texts, data=octets, little=st.booleans())
def test_compressed_images_as_rosbags_writes_them(
    time: tuple[int, int], frame_id: str, form: str, data: bytes, little: bool
) -> None:
    sent = RosCompressed(Header(stamp=Time(*time), frame_id=frame_id), form, np.frombuffer(data, np.uint8))

    read = read_compressed_image(
        bytes(ROS.serialize_cdr(sent, "sensor_msgs/msg/CompressedImage", little_endian=little))
    )

    assert (read.format, bytes(read.data), read.header.frame_id) == (form, data, frame_id)
    assert (read.header.stamp.sec, read.header.stamp.nanosec) == time


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_message_or_a_frame_error(data: bytes, framed: bool) -> None:
    for read in (read_image, read_compressed_image):
        try:
            read(b"\0\1\0\0" + data if framed else data)
        except FrameError:
            continue


@given(st.integers(0, 2000))
def test_a_message_that_is_cut_short_is_an_error(keep: int) -> None:
    header = Header(stamp=Time(1, 2), frame_id="camera")
    sent = RosImage(header, 5, 7, "rgb8", 0, 21, PICTURE.reshape(-1))
    whole = bytes(ROS.serialize_cdr(sent, "sensor_msgs/msg/Image"))
    with pytest.raises(FrameError, match="cannot be read"):
        read_image(whole[: min(keep, len(whole) - 4)])
