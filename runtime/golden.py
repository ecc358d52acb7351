"""The golden step: one recorded input with the reference policy's own outputs, replayed at every start.

It catches what hashes cannot: a provider that computes wrongly on this machine. One step from a zero state is cheap enough to run always
and touches every weight of all three stages. The expected numbers are the reference's, not an engine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from bundle.errors import BackendError, BundleError, PromptError
from bundle.manifest import Manifest, Precision

if TYPE_CHECKING:
    from runtime.policy import Policy

GOLDEN_NAME = "golden.npz"

# Largest |action| difference (normalised, tanh or logits relative to their scale) and smallest feature cosine, by precision.
ACTION_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2}
FEATURE_COSINE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999}
# Of INT8, whatever was recorded: beyond these a wrong kernel could not be told from rounding.
LEAST_COSINE, MOST_ERROR = 0.9, 0.3


@dataclass(frozen=True)
class Golden:
    """One step's inputs and the reference's outputs.

    Attributes:
        frames: uint8 [cameras, image_size, image_size, 3].
        token_ids: int64 [L].
        feature: float32 [latent * D].
        action: float32 [n, A], as the head gives it.
    """

    frames: NDArray[np.uint8]
    token_ids: NDArray[np.int64]
    feature: NDArray[np.float32]
    action: NDArray[np.float32]

    def save(self, folder: Path) -> None:
        """Write folder/golden.npz."""
        with (folder / GOLDEN_NAME).open("wb") as file:
            np.savez(file, frames=self.frames, token_ids=self.token_ids, feature=self.feature, action=self.action)

    @classmethod
    def load(cls, folder: Path) -> Golden:
        """Read folder/golden.npz (arrays only; pickled objects are refused)."""
        try:
            with np.load(folder / GOLDEN_NAME, allow_pickle=False) as arrays:
                return cls(arrays["frames"], arrays["token_ids"], arrays["feature"], arrays["action"])
        except (ValueError, KeyError, EOFError, OSError, BadZipFile) as error:
            raise BundleError(
                f"{folder / GOLDEN_NAME} is damaged", got=error, hint="copy the bundle again, or rebuild it."
            ) from None


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Cosine of the angle between two arrays, taken as vectors, in float64; 0 for a zero or non-finite vector."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    value = float(x @ y) / norm if norm else 0.0
    return value if np.isfinite(value) else 0.0


def tolerances(manifest: Manifest) -> tuple[float, float]:
    """Smallest feature cosine and largest action error that the precision explains.

    What INT8 itself does to the golden step was recorded when the bundle was quantized. Three times that, because kernels round a sum that
    lies between two integers to different sides, and the next layer starts from there; a wrong kernel is off by far more. Never below
    LEAST_COSINE or above MOST_ERROR.
    """
    if manifest.precision != "int8":
        return FEATURE_COSINE[manifest.precision], ACTION_TOLERANCE[manifest.precision]
    quantized = manifest.quantized
    assert quantized is not None, "Manifest.int8 makes no view without it"
    least, most = 1 - 3 * (1 - quantized.golden_cosine) - 1e-4, 3 * quantized.golden_error + 1e-2
    return max(LEAST_COSINE, least), min(MOST_ERROR, most)


def deviation(policy: Policy, expected: Golden) -> tuple[float, float]:
    """Feature cosine and action error of one step on the golden frames, after a reset to the golden instruction."""
    chunk = policy.step_resized(expected.frames)
    scale = max(1.0, float(np.abs(expected.action).max()))
    return cosine(chunk.feature, expected.feature), float(np.abs(chunk.normalized - expected.action).max()) / scale


def check(policy: Policy, folder: Path) -> None:
    """Replay the golden step; leaves the policy without an instruction, as after loading.

    Raises:
        BackendError: the numbers differ by more than the precision explains.
    """
    expected = Golden.load(folder)
    try:
        policy.reset(token_ids=[int(token) for token in expected.token_ids])
    except PromptError as short:
        raise BackendError(
            f"{policy.backend} cannot replay the golden step",
            got=f"{short.what}: {short.got}",
            expected="an engine as long as the bundle's first instruction",
            hint="build engines of all lengths: build_engines.py --engines-only BUNDLE, without --bucket.",
        ) from None
    similarity, error = deviation(policy, expected)
    policy.clear()
    least, most = tolerances(policy.manifest)
    if similarity < least or not error <= most:
        raise BackendError(
            f"{policy.backend} computes wrong numbers on this machine",
            got=f"feature cosine {similarity:.6f}, action error {error:.2e}",
            expected=f"at least {least:.6g}, at most {most:.0e}",
            hint="try --backend ort:cpu; if that fails too, rebuild the bundle.",
        )
