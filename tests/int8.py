"""Makes this CPU look like one without VNNI, whose products of uint8 by int8 saturate."""

from __future__ import annotations

from typing import Any

import pytest

from bundle.errors import BackendError
from runtime.backends import ort
from runtime.backends.ort_probe import probe_int8


def signed_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe refuses whatever is computed with int8 weights, and looks at the rest."""

    def probe(name: str, open_stage: Any) -> None:
        if not open_stage.__self__._unsigned:
            raise BackendError("this CPU's 8-bit products saturate", hint="-")
        probe_int8(name, open_stage)

    monkeypatch.setattr(ort, "probe_int8", probe)
