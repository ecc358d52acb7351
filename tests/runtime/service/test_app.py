"""The service as its clients meet it, over real connections: answers, refusals, and that no refusal costs the robots that drive."""

from __future__ import annotations

import base64
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bundle.errors import BackendError, BundleError, DeviceError, JetvlaError
from bundle.manifest import Manifest
from runtime.policy import Policy
from runtime.service.app import Limits
from runtime.service.pictures import encode
from runtime.service.wire import ErrorAnswer, Health, Prediction, ResetAnswer
from tests.bundles import GO_LEFT, GO_RIGHT, IMAGE_SIZE, make_bundle, random_frames
from tests.runtime.service.serving import KEY, PATIENCE_S, Gated, Served, Serving, serve_bundle

FRAMES = random_frames(8, seed=11)[:, 0]
PNGS = [encode(frame, "png") for frame in FRAMES]


def post_form(served: Served, png: bytes, **fields: object) -> httpx.Response:
    data = {name: str(value) for name, value in {"session": "a", **fields}.items()}
    return served.http.post("/predict", data=data, files={"image": ("frame.png", png, "image/png")})


def post_json(served: Served, png: bytes, **fields: object) -> httpx.Response:
    return served.http.post("/predict", json={"session": "a", "image": base64.b64encode(png).decode(), **fields})


def predicted(response: httpx.Response) -> Prediction:
    assert response.status_code == 200, response.text
    return msgspec.json.decode(response.content, type=Prediction)


def error(response: httpx.Response, status: int) -> ErrorAnswer:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = msgspec.json.decode(response.content, type=ErrorAnswer)
    assert answer.hint
    assert "Traceback" not in response.text
    return answer


def metric(served: Served, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(served.http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


@pytest.fixture
def gated(bundle: Path) -> Gated:
    return Gated(Policy.load(bundle, "ort:cpu", threads=1))


def test_answers_are_those_of_the_policy(serving: Serving, policy: Policy) -> None:
    policy.reset(GO_LEFT)
    with serving() as served:
        for step, (frame, png) in enumerate(zip(FRAMES, PNGS, strict=True)):
            expected = policy.step(frame)
            post = post_json if step % 2 else post_form

            got = predicted(post(served, png, instruction=GO_LEFT, expect_step=step))

            np.testing.assert_array_equal(np.array(got.values, np.float32), expected.values)
            np.testing.assert_array_equal(np.array(got.normalized, np.float32), expected.normalized)
            assert (got.step, got.reset, got.instruction, got.session) == (step, step == 0, GO_LEFT, "a")
            assert (got.action_names, got.units) == (["linear_x", "linear_y"], ["m/s", "m/s"])
            assert got.bundle == policy.manifest.manifest_sha256
            assert set(got.timing) >= {"receive", "decode", "queue", "replay", "vision", "policy", "total"}
            assert got.timing["total"] >= got.timing["policy"]
        # The session's own instruction, a data URL, and another instruction.
        url = "data:image/png;base64," + base64.b64encode(PNGS[0]).decode()
        assert predicted(served.http.post("/predict", json={"session": "a", "image": url})).step == len(FRAMES)
        changed = predicted(post_form(served, PNGS[0], instruction=GO_RIGHT))
        assert (changed.step, changed.reset) == (0, True)


def test_sessions_do_not_see_each_other(serving: Serving, bundle: Path) -> None:
    alone = {name: Policy.load(bundle, "ort:cpu", threads=1) for name in "ab"}
    with serving() as served:
        for name, instruction in zip("ab", (GO_LEFT, GO_RIGHT), strict=True):
            alone[name].reset(instruction)
            answer = served.http.post("/reset", json={"session": name, "instruction": instruction})
            assert msgspec.json.decode(answer.content, type=ResetAnswer).step == 0
        for frame, png in zip(FRAMES, PNGS, strict=True):
            for name, policy in alone.items():
                got = predicted(post_form(served, png, session=name))
                np.testing.assert_array_equal(np.array(got.values, np.float32), policy.step(frame).values)
        assert metric(served, "jetvla_sessions") == 2
        assert metric(served, "jetvla_replayed_features_total") > 0
    for policy in alone.values():
        policy.close()


def test_health_policy_and_metrics(serving: Serving, bundle: Path) -> None:
    with serving(key=KEY) as served:
        health = msgspec.json.decode(httpx.get(f"{served.url}/health").content, type=Health)
        assert (health.status, health.loaded, health.backend, health.precision) == ("ok", True, "ort:cpu", "fp32")
        manifest = Manifest.decode(served.http.get("/policy").content)
        assert manifest == Manifest.load(bundle)
        assert health.bundle == manifest.manifest_sha256
        predicted(post_form(served, PNGS[0], instruction=GO_LEFT))
        error(post_form(served, b"no picture", instruction=GO_LEFT), 415)
        assert metric(served, "jetvla_requests_total", path="/predict", code="200") == 1
        assert metric(served, "jetvla_requests_total", path="/predict", code="415") == 1
        assert metric(served, "jetvla_refused_total", reason="image_type") == 1
        assert metric(served, "jetvla_step_seconds_count", section="vision") == 1
        # This very request.
        assert metric(served, "jetvla_requests_in_flight") == 1


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 422, "truncated"),
        (b"{", 422, "truncated"),
        (b"[" * 50_000, 422, "Expected `object`"),
        (b'{"session":"a","image":"AAAA","instruction":"x","more":1}', 422, "more"),
        (b'{"session":"a","image":"AAAA","expect_step":"1"}', 422, "expect_step"),
        (b'{"session":"a b","image":"AAAA"}', 422, "session"),
        (b'{"session":"a\\n","image":"AAAA"}', 422, "session"),
        (b'{"session":"' + b"a" * 65 + b'","image":"AAAA"}', 422, "session"),
        (b'{"session":"../a","image":"AAAA"}', 422, "session"),
        (b'{"session":"a"}', 422, "image"),
        (b'{"session":"a","image":"AAAA","instruction":""}', 422, "instruction"),
        (b'{"session":"a","image":"\xff"}', 422, "utf-8"),
        (b'{"session":"a","image":"%%%%"}', 422, ""),
        (b'{"session":"a","image":"aGVsbG8="}', 415, "bytes"),
    ],
)
def test_json_that_does_not_fit_is_refused(served: Served, body: bytes, status: int, word: str) -> None:
    answer = error(served.http.post("/predict", content=body, headers={"content-type": "application/json"}), status)
    assert word in str(answer.got)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One service for all tests that only get refusals."""
    with serve_bundle(make_bundle(tmp_path_factory.mktemp("served"))) as running:
        yield running


def test_forms_that_do_not_fit_are_refused(served: Served) -> None:
    picture = ("frame.png", PNGS[0], "image/png")
    for data, files, word in (
        ({"session": "a", "more": "1"}, {"image": picture}, "more"),
        ({"session": "a", "expect_step": "one"}, {"image": picture}, "expect_step"),
        ({"session": "a", "expect_step": "-1"}, {"image": picture}, "expect_step"),
        ({"instruction": GO_LEFT}, {"image": picture}, "session"),
        ({"session": ["a", "b"]}, {"image": picture}, "'session' twice"),
        ({"session": "a", "image": "text"}, {"other": picture}, "'image' as a plain field"),
        ({"session": "a"}, {"image": picture, "second": picture}, "'second' as a file"),
        ({"session": "a"}, [("image", picture), ("image", picture)], "'image' twice"),
        ({"session": "a"}, {"session": picture}, "twice"),
    ):
        answer = error(served.http.post("/predict", data=data, files=files), 422)  # type: ignore[arg-type]
        assert word in str(answer.got), answer
    kind = "multipart/form-data; boundary=x"
    for body in (
        b"",
        b"--x",
        b"garbage",
        b"--x\r\n\r\n--x--",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
    ):
        error(served.http.post("/predict", content=body, headers={"content-type": kind}), 422)
    error(served.http.post("/predict", content=b"x", headers={"content-type": "multipart/form-data"}), 422)


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b'; filename="f"' if name == "image" else b"", content)
        for name, content in fields
    ]
    return b"".join(parts) + b"--x--\r\n"


@pytest.mark.parametrize(
    "extra",
    ["charset=punycode", "Charset = 'x'", 'charset="idna"', "charset=utf-8; charset=punycode", "charset*=utf-16"],
)
def test_a_charset_chooses_no_codec(served: Served, extra: str) -> None:
    """Decoding punycode takes the square of its length: 200 kB of it stopped the service whole."""
    body = form(("session", b"forms"), ("instruction", GO_LEFT.encode()), ("image", PNGS[0]))
    for kind in ("multipart/form-data; boundary=x", "application/json"):
        answer = error(served.http.post("/predict", content=body, headers={"content-type": f"{kind}; {extra}"}), 415)
        assert (answer.reason, answer.expected) == ("content_type", "UTF-8")


@pytest.mark.parametrize("extra", ["", "; charset=utf-8", '; charset="UTF-8"', "; charset=us-ascii"])
def test_forms_are_utf_8(served: Served, extra: str) -> None:
    kind = {"content-type": f"multipart/form-data; boundary=x{extra}"}
    good = form(("session", b"forms"), ("instruction", GO_LEFT.encode()), ("image", PNGS[0]))
    predicted(served.http.post("/predict", content=good, headers=kind))
    latin = form(("session", b"forms"), ("instruction", "gauche, à".encode("latin-1")), ("image", PNGS[0]))
    assert "'instruction' that is no UTF-8" in str(
        error(served.http.post("/predict", content=latin, headers=kind), 422).got
    )
    korean = form(("session", b"forms"), ("instruction", "왼쪽".encode()), ("image", PNGS[0]))
    assert error(served.http.post("/predict", content=korean, headers=kind), 422).reason == "instruction"
    long = form(("session", b"forms"), ("instruction", b"a" * 20_000), ("image", PNGS[0]))
    assert error(served.http.post("/predict", content=long, headers=kind), 422).reason == "request"


def test_pictures_and_instructions_that_cannot_be_used_are_refused(served: Served) -> None:
    assert error(post_form(served, PNGS[0][:60], instruction=GO_LEFT), 422).reason == "image"
    unknown = error(post_form(served, PNGS[0], instruction="words that no tokenizer is there for"), 422)
    assert (unknown.error, unknown.reason) == ("PromptError", "instruction")
    assert error(served.http.post("/reset", json={"session": "a", "instruction": "other words"}), 422).hint
    assert error(post_form(served, PNGS[0]), 404).what == "there is no session a"


def test_other_types_methods_and_paths_are_refused(served: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error(served.http.post("/predict", content=b"{}", headers={"content-type": kind}), 415)
    error(served.http.post("/reset", data={"session": "a"}), 415)
    error(served.http.post("/predict", content=b"{}", headers={"content-encoding": "gzip"}), 415)
    assert error(served.http.get("/predict"), 405).got == "GET /predict"
    assert served.http.get("/predict").headers["allow"] == "POST"
    for path in ("/", "/docs", "/redoc", "/predict/", "/../etc/passwd"):
        error(served.http.get(path), 404)


def test_the_description_matches_the_service(served: Served) -> None:
    described = served.http.get("/openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/reset", "/policy", "/health", "/metrics"}
    assert described["components"]["securitySchemes"]["key"]["name"] == "X-API-Key"
    assert described["paths"]["/health"]["get"]["security"] == []
    schemas = described["components"]["schemas"]
    assert schemas["PredictForm"]["properties"]["image"]["format"] == "binary"
    assert schemas["PredictRequest"]["additionalProperties"] is False
    # Every reference leads somewhere.
    text = json.dumps(described)
    for name in {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    prediction = predicted(post_form(served, PNGS[0], instruction=GO_LEFT))
    assert set(schemas["Prediction"]["required"]) == set(msgspec.to_builtins(prediction))


def test_lost_history_is_told(serving: Serving) -> None:
    with serving(limits=Limits(session_expiry_s=0.05)) as served:
        predicted(post_form(served, PNGS[0], instruction=GO_LEFT, expect_step=0))
        deadline = time.monotonic() + PATIENCE_S
        while metric(served, "jetvla_sessions") and time.monotonic() < deadline:
            time.sleep(0.1)
            answer = post_form(served, PNGS[1], session="other")
            assert answer.status_code == 404
        lost = error(post_form(served, PNGS[1], instruction=GO_LEFT, expect_step=1), 409)
        assert (lost.reason, lost.step) == ("history", None)


def test_another_bundle_than_wanted_is_refused(serving: Serving) -> None:
    with serving() as served:
        answer = error(post_form(served, PNGS[0], instruction=GO_LEFT, bundle="0" * 64), 409)
        assert answer.reason == "bundle"
        answer = error(
            served.http.post("/reset", json={"session": "a", "instruction": GO_LEFT, "bundle": "0" * 64}), 409
        )
        assert answer.reason == "bundle"
        assert metric(served, "jetvla_sessions") == 0


def test_steps_run_one_at_a_time_and_a_long_queue_is_refused(serving: Serving, gated: Gated) -> None:
    gated.gate.clear()
    answers: list[httpx.Response] = []
    with serving(policy=gated, limits=Limits(max_waiting=2)) as served:
        threads = [
            threading.Thread(
                target=lambda name=name: answers.append(post_form(served, PNGS[0], session=name, instruction=GO_LEFT))
            )
            for name in "abc"
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while metric(served, "jetvla_requests_in_flight") < 4 and time.monotonic() < deadline:
            time.sleep(0.02)

        busy = post_form(served, PNGS[0], session="d", instruction=GO_LEFT)

        assert error(busy, 503).reason == "busy"
        assert int(busy.headers["retry-after"]) >= 1
        # The loop is free while a step runs.
        assert served.http.get("/health").status_code == 200
        gated.gate.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert gated.most == 1
        # Places are free again.
        predicted(post_form(served, PNGS[0], session="d", instruction=GO_LEFT))


def test_a_client_that_went_away_costs_no_step(serving: Serving, gated: Gated) -> None:
    gated.gate.clear()
    with serving(policy=gated) as served:
        first = threading.Thread(target=post_form, args=(served, PNGS[0]), kwargs={"instruction": GO_LEFT})
        first.start()
        assert gated.entered.acquire(timeout=PATIENCE_S)
        # It waits for the turn, and is gone when that comes.
        impatient = httpx.Client(base_url=served.url, timeout=0.5, trust_env=False, verify=False)
        with impatient, pytest.raises(httpx.ReadTimeout):
            post_form(replace(served, http=impatient), PNGS[0], session="second", instruction=GO_LEFT)
        gated.gate.set()
        first.join(PATIENCE_S)
        predicted(post_form(served, PNGS[0], session="third", instruction=GO_LEFT))
        assert gated.steps == 2
        assert metric(served, "jetvla_refused_total", reason="gone") == 1


def test_a_failed_step_is_told_and_changes_nothing(serving: Serving, gated: Gated, policy: Policy) -> None:
    policy.reset(GO_LEFT)
    with serving(policy=gated) as served:
        predicted(post_form(served, PNGS[0], instruction=GO_LEFT))
        gated.fail = BackendError("the engine stumbled", got="a NaN", hint="try again")
        answer = error(post_form(served, PNGS[1]), 500)
        assert (answer.error, answer.what, answer.got) == ("BackendError", "the engine stumbled", "a NaN")
        gated.fail = RuntimeError("a secret detail")
        answer = error(post_form(served, PNGS[1]), 500)
        assert (answer.got, "secret" in str(answer)) == ("RuntimeError", False)
        gated.fail = None
        for step, frame in enumerate(FRAMES[:2]):
            expected = policy.step(frame)
            if step:
                got = predicted(post_form(served, PNGS[step], expect_step=1))
        np.testing.assert_array_equal(np.array(got.values, np.float32), expected.values)


@pytest.mark.parametrize(
    "lost",
    [
        DeviceError("the GPU fell off the bus", hint="start again", sticky=True),
        BundleError("weights were changed while they were in use", hint="start again"),
    ],
)
def test_a_lost_device_or_bundle_is_fatal(serving: Serving, gated: Gated, lost: JetvlaError) -> None:
    with serving(policy=gated) as served:
        predicted(post_form(served, PNGS[0], instruction=GO_LEFT))
        gated.fail = lost
        assert error(post_form(served, PNGS[1]), 503).reason == "failed"
        assert served.fatal.wait(PATIENCE_S)
        gated.fail = None
        assert error(post_form(served, PNGS[1]), 503).reason == "failed"
        health = served.http.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["loaded"]) == (503, "failed", False)


def test_the_largest_frame_allowed_is_taken(serving: Serving) -> None:
    with serving(limits=Limits(max_pixels=IMAGE_SIZE**2)) as served:
        predicted(post_form(served, PNGS[0], instruction=GO_LEFT))
        wide = encode(np.zeros((IMAGE_SIZE, IMAGE_SIZE + 1, 3), np.uint8), "png")
        assert error(post_form(served, wide, instruction=GO_LEFT), 413).reason == "pixels"
