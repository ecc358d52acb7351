"""The one exception tree of jetvla, and the shape of every message.

Every error a user can cause says what happened, what was got and expected, and - after a blank line - how to mend it.
Programmers' errors (wrong types, broken invariants) stay plain Python exceptions: nobody should catch those.
"""

from __future__ import annotations

_LONGEST = 4000


def _shown(value: object) -> str:
    """A value as text that a terminal can show: names and values of strangers' files stand in messages."""
    text = str(value)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


class JetvlaError(Exception):
    """Base of all errors that a user can mend.

    Args:
        what: one sentence, what happened and where.
        got: what was found.
        expected: what should have been there.
        hint: how to mend it; always present.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.hint = hint
        lines = [_shown(what)]
        if got is not None:
            lines.append(f"  got:      {_shown(got)}")
        if expected is not None:
            lines.append(f"  expected: {_shown(expected)}")
        super().__init__("\n".join(lines) + f"\n\nhint: {hint}")


class ConfigError(JetvlaError):
    """A training config, robot file or command line that contradicts itself or the checkpoint."""


class InputFileError(JetvlaError):
    """A file that is no regular one, or larger, deeper or longer than anything of its kind (bundle/reading_limits.py)."""


class CheckpointError(JetvlaError):
    """A checkpoint that cannot be read safely and completely."""


class BaseWeightsError(CheckpointError):
    """Base weights that are missing, or are not those the checkpoint was trained on."""


class UnsupportedPolicyError(CheckpointError):
    """A policy variant that is known by name but that jetvla does not build."""


class TrainingError(JetvlaError):
    """A run that cannot go on: numbers that are not finite, memory that does not suffice, a proof that failed."""


class ExportError(JetvlaError):
    """A stage that could not be turned into a valid graph."""


class CalibrationError(JetvlaError):
    """A bundle that cannot be quantized as asked: no INT8 form stays within the budget, or the data does not fit it."""


class ParityError(JetvlaError):
    """An engine that does not do what the checkpoint does."""


class BundleError(JetvlaError):
    """A bundle that is incomplete, corrupt, or not a bundle."""


class BundleVersionError(BundleError):
    """A bundle written by another schema version."""


class BundleLockedError(BundleError):
    """Another process is building this bundle."""


class StorageError(JetvlaError):
    """The disk is full or refuses to write."""


class EpisodeError(JetvlaError):
    """An episode file that cannot be read, or does not have a known schema."""


class RecordingError(EpisodeError):
    """A flight recording that cannot be read or written."""


class CameraError(JetvlaError):
    """A camera that is not there, is lost, or gives something else than the robot file says."""


class CommandError(JetvlaError):
    """Commands that cannot reach the robot."""


class LimitsError(ConfigError):
    """Limits that are missing, senseless, or looser than those they should tighten."""


class RobotLockedError(JetvlaError):
    """Somebody else is driving this robot."""


class WatchdogError(JetvlaError):
    """The watchdog is gone, or has stopped the robot: nothing may move any more."""


class ServiceError(JetvlaError):
    """A policy service that does not answer, answers late, or refuses."""


class FrameError(JetvlaError):
    """An image that is not uint8 [H, W, 3], or cannot be decoded."""


class PictureError(FrameError):
    """A picture file that is refused.

    Args:
        fault: `format` (neither JPEG nor PNG), `pixels` (more than allowed), `meaning` (a form in which nothing says what the numbers
            look like), or `damaged`.
    """

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, hint: str, fault: str = "damaged"
    ) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint)
        self.fault = fault


class PromptError(JetvlaError):
    """An instruction that is empty, too long for the bundle, or cannot be tokenised."""


class BackendError(JetvlaError):
    """An execution backend that is not there, refused a graph, or gave wrong numbers.

    Args:
        absent: what it needs is simply not on this machine; a search for a backend passes over it without a warning.
    """

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, hint: str, absent: bool = False
    ) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint)
        self.absent = absent


class NotFiniteError(BackendError):
    """An action that is not finite: whatever computed it is broken, and what it said before is not to be driven on."""


class EngineError(BackendError):
    """A TensorRT engine that is absent, corrupt, or made for another machine, version or bundle."""


class NoEnginesError(EngineError):
    """A bundle without engines for this machine; other engines of it may well be there."""


class EngineBuildError(ExportError):
    """A graph that TensorRT refused, or an engine build that failed or was killed."""


class DeviceError(BackendError):
    """The GPU, its driver or CUDA: absent, too old, out of memory, or failed.

    Args:
        sticky: the process cannot use the GPU any more; only a new process can.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        hint: str,
        absent: bool = False,
        sticky: bool = False,
    ) -> None:
        super().__init__(what, got=got, expected=expected, hint=hint, absent=absent)
        self.sticky = sticky
