"""What is published with a variant, what stays, and the golden step that it must not be far off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import calib.publish
from bundle.errors import CalibrationError
from bundle.manifest import Manifest
from calib.publish import _golden
from export.console import Reporter
from runtime.golden import MOST_ERROR, Golden
from tests.calib.conftest import Own
from tests.calib.quantizing import accepted, config, quietly, report_of
from tests.export.builds import contents, left_over

pytestmark = pytest.mark.usefixtures("driving_by_noise")


def golden_step(bundle: Path, *, random: bool = False, budget: float = 0.01, **changes: Any) -> tuple[float, float]:
    """Through the bundle's files, against another golden step."""
    was = Golden.load(bundle)
    (bundle / "golden.npz").unlink()
    Golden(**({name: getattr(was, name) for name in ("frames", "token_ids", "feature", "action")} | changes)).save(
        bundle
    )
    result: Any = SimpleNamespace(
        acceptances={"ort:cpu": None}, random=random, config=config(bundle, bundle, max_action_error=budget)
    )
    return _golden(bundle, Manifest.load(bundle), result, Reporter(1, quiet=True))


def off_by(bundle: Path, amount: float) -> dict[str, Any]:
    """An action that the INT8 variant misses by so much, whatever its own error."""
    similarity, error = golden_step(bundle, random=True)
    found = Manifest.load(bundle).quantized
    assert found is not None
    assert (similarity, error) == pytest.approx((found.golden_cosine, found.golden_error), abs=1e-6)
    return {"action": Golden.load(bundle).action + np.float32(amount)}


def test_the_golden_step_has_a_ceiling(own_quantized: Path) -> None:
    """Beyond it the check at every start would check nothing."""
    bundle = own_quantized
    feature = Golden.load(bundle).feature
    for bad in ({"feature": -feature}, off_by(bundle, 0.2), off_by(bundle, float("nan"))):
        before = Golden.load(bundle)
        with pytest.raises(CalibrationError, match="too far off on the golden step"):
            golden_step(bundle, **bad)
        (bundle / "golden.npz").unlink()
        before.save(bundle)


def test_a_larger_budget_lifts_it_and_made_up_pictures_have_that_of_every_start(own_quantized: Path) -> None:
    """To five times the budget, but never above what the check at a start allows at most."""
    bundle = own_quantized
    before, bad, worse = Golden.load(bundle), off_by(bundle, 0.2), off_by(bundle, MOST_ERROR + 0.1)
    _, error = golden_step(bundle, budget=0.05, **bad)
    assert 0.15 < error < 0.25
    with pytest.raises(CalibrationError, match=f"at most {MOST_ERROR:g}"):
        golden_step(bundle, budget=2.0, **worse)
    with pytest.raises(CalibrationError, match=r"at least 0\.9, at most 0\.3"):
        golden_step(bundle, random=True, feature=-before.feature)


def test_too_far_off_nothing_is_published(own: Own, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = own()
    before = contents(bundle)
    monkeypatch.setattr(calib.publish, "deviation", lambda *_: (0.949, 0.0))
    with pytest.raises(CalibrationError, match=r"golden step(?s:.*)0\.9490(?s:.*)at least 0\.95"):
        quietly(config(bundle, recorded, keep_float=("projection", "language.0-1")))
    assert contents(bundle) == before
    assert not [name for name in left_over(bundle.parent) if "building" in name]


def test_the_report_tells_the_tries(quantized: tuple[Path, str]) -> None:
    bundle, _ = quantized
    assert report_of(bundle).tries == 1
    assert accepted(bundle).verdict == "PASS"
    assert "tried on the test frames" in (bundle / "reports" / "quantization.html").read_text()
