"""What a latency run is asked to measure, as its command line takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.baselines import NAMES
from bundle.errors import ConfigError


@dataclass(frozen=True)
class Ask:
    """What to measure.

    Attributes:
        threads: CPU threads; 0 takes all.
        steps: timed steps; 0 takes as many as fit into half a minute, 30 to 500.
        warmup: steps before.
        minutes: of a soak after them: does it stay as fast when it is hot?
        deadline_ms: for a decision, from the tick to the command.
        rate: of the control loop, in Hz.
        ticks: of the control loop; 0 leaves it out.
        camera_fps: of the camera in the control loop.
        baselines: other ways to compute the same, in turns with ours: names, or `all`.
        checkpoint: for the baselines; without it they have random weights of the same shapes.
        rounds: pairs of each baseline.
    """

    threads: int = 0
    steps: int = 0
    warmup: int = 5
    minutes: float = 0.0
    deadline_ms: float = 200.0
    rate: float = 5.0
    ticks: int = 50
    camera_fps: float = 30.0
    baselines: tuple[str, ...] = ()
    checkpoint: Path | None = None
    rounds: int = 10

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: it does not.
        """
        for name, least in (("steps", 0), ("warmup", 0), ("minutes", 0), ("ticks", 0), ("rounds", 1), ("threads", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(
                    f"--{name} is too small", got=getattr(self, name), expected=f"at least {least}", hint="see --help."
                )
        for name in ("deadline_ms", "rate", "camera_fps"):
            if not 0 < getattr(self, name) < 1e6:
                option = name.replace("_", "-")
                raise ConfigError(
                    f"--{option} is out of range", got=getattr(self, name), expected="above 0", hint="see --help."
                )
        unknown = sorted({*self.baselines} - {*NAMES, "all"})
        if unknown:
            raise ConfigError(
                f"there is no baseline {', '.join(unknown)}", expected=f"all, {', '.join(NAMES)}", hint="see --help."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the baselines."""
        return NAMES if "all" in self.baselines else self.baselines
