"""peft's own folder as a checkpoint: adapter_config.json and adapter_model.safetensors, with head and action token in a file beside them.

peft saves what it wraps, which is the backbone; the action head and the action token are not in it. They are looked for in the same folder,
in any file that jetvla reads, and so is the training config (docs/checkpoints.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bundle.errors import CheckpointError
from bundle.reading_limits import read_json
from train.safetensors_file import read_safetensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
REST_NAMES = ("policy.safetensors", "policy.ckpt", "policy.pt", "non_lora_trainables.bin")


def is_peft_folder(path: Path) -> bool:
    """Whether peft's `save_pretrained` wrote a folder."""
    return path.is_dir() and (path / CONFIG_NAME).is_file()


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's config, and its tensors by raw key.

    Raises:
        CheckpointError: a file is missing, damaged, or pickled.
    """
    if not (folder / WEIGHTS_NAME).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise CheckpointError(
            f"{folder} lacks {WEIGHTS_NAME}",
            got="adapter_model.bin, a pickle" if pickled else "no weights",
            expected=WEIGHTS_NAME,
            hint="model.save_pretrained(DIR, safe_serialization=True) writes it.",
        )
    values = read_json(folder / CONFIG_NAME, error=CheckpointError, hint="copy the folder again.")
    _, tensors = read_safetensors(folder / WEIGHTS_NAME, hint="copy the folder again.")
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{folder / CONFIG_NAME} is damaged", got=type(values).__name__, expected="an object", hint="copy it again."
        )
    return values, tensors


def rest_of(folder: Path) -> Path:
    """The file beside the adapter that holds head and action token.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    found = [folder / name for name in REST_NAMES if (folder / name).is_file()]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} is peft's folder: an adapter, without the action head and action token that a policy needs"
            if not found
            else f"{folder} has more than one file that may hold the action head",
            got=", ".join(path.name for path in found) or "the adapter alone",
            expected=f"one of {', '.join(REST_NAMES)} beside it, with `act_head.*` and `action_token`",
            hint="torch.save({'state_dict': {k: v for k, v in model.state_dict().items() if 'act_head' in k or 'action_token' in k}}, "
            "DIR / 'policy.pt'); the training config goes beside it as config.json.",
        )
    return found[0]
