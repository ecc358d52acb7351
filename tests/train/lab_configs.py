"""Public training configs, shortened to the keys that act or are refused, and what becomes of each.

docs/lab-configs.md is made of them: python -m tests.train.lab_configs > docs/lab-configs.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bundle.errors import JetvlaError
from train.config import policy_spec
from train.load_config import load_run_config

_FILE = Path(__file__).with_name("lab_configs.json")
_INTRO = """# What becomes of public training configs

{trained} of these {count} configs of RoboVLMs, its 2-DoF fork and the lab's two project repositories train here; the others name the one
thing that is not done. `builds` is whether a checkpoint with this config is exported. What is said is the number of notes before the first
step (`python train/finetune.py CONFIG --dry-run` shows them), or the refusal. Which key does what:
[docs/training-config.md](training-config.md#keys-of-robovlms-configs).

Made by a test: `python -m tests.train.lab_configs > docs/lab-configs.md`.

| config | trains | builds | what is said |
|---|---|---|---|
"""


def lab_configs() -> dict[str, dict[str, Any]]:
    """Config by name, as plain data."""
    stored = json.loads(_FILE.read_text(encoding="utf-8"))
    return {name: _config(stored["common"], changes) for name, changes in stored["configs"].items()}


def _config(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The common values with a config's own, null meaning that it has no such key; nested by the dots of the paths."""
    if "alone" in changes:
        alone: dict[str, Any] = changes["alone"]
        return alone
    config: dict[str, Any] = {}
    for path, value in {**common, **changes}.items():
        if value is not None:
            *above, leaf = path.split(".")
            section = config
            for name in above:
                section = section.setdefault(name, {})
            section[leaf] = value
    return config


def fate(config: dict[str, Any], folder: Path) -> tuple[bool, bool, str]:
    """(trains, builds, what is said)."""
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        policy_spec(config)
        builds = True
    except JetvlaError:
        builds = False
    try:
        loaded = load_run_config(path)
    except JetvlaError as error:
        said = error.what.removeprefix(f"{path}: ").replace(str(path), "the file")
        return False, builds, f"{said}; expected {error.expected}"
    assert loaded.notes.unknown == ()
    return True, builds, f"{len(loaded.notes.assumed)} notes"


def table(folder: Path) -> str:
    """docs/lab-configs.md as it should be; `folder` is for scratch files."""
    rows, trained = [], 0
    configs = lab_configs()
    for name, config in configs.items():
        trains, builds, said = fate(config, folder)
        trained += trains
        cells = ("yes" if trains else "no", "yes" if builds else "no", said.replace("|", "\\|"))
        rows.append(f"| {name.replace('__', ' ')} | {' | '.join(cells)} |")
    return _INTRO.format(trained=trained, count=len(configs)) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        print(table(Path(scratch)), end="")
