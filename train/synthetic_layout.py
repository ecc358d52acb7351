"""The sizes of synthetic policies, and the keys of a lab's checkpoint in their order.

The layout itself is that of train/robovlms_layout.py. Knows shapes, not values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import Kosmos2Config

from bundle.errors import ConfigError
from bundle.manifest import HeadKind
from train.config import HeadSpec
from train.robovlms_layout import Key, PeftNaming, layout_keys

Size = Literal["tiny", "small", "full"]
FileLayout = Literal["upstream", "fork"]

WINDOW = 8
CHUNK = 10
_LSTM_LAYERS = 4
_HIDDEN: dict[Size, int] = {"tiny": 40, "small": 128, "full": 512}
_OUTPUTS: dict[HeadKind, int] = {"actions_gripper": 7, "velocities": 2, "classes": 9}


@dataclass(frozen=True)
class SyntheticOptions:
    """Which checkpoint to make. Layout, peft and base_weights concern the files and leave the policy as it is.

    Attributes:
        size: `tiny` has 2+3 layers (20 MB), `small` 6+6 layers (140 MB), `full` is the real Kosmos-2 (7 GB).
        layout: whose trainer wrote it: upstream's, or the 2-DoF fork's.
        head: `velocities` and `classes` exist in the fork only, and mark a file as the fork's whatever its layout.
        lora: adapters on every Linear but the language-model head; otherwise a frozen backbone.
        peft: `new` names adapted weights `base_layer`, `old` (before 0.6) does not.
        hand_camera: the policy sees a second camera.
        latent: number of action tokens.
        pooling: reduce action tokens by max pooling instead of concatenation.
        action_dim: width of a chunk step, gripper included; for `classes`, how many. By default 7, 2, or 9 classes.
        hidden_size: of the LSTM; by default 40, 128 and 512.
        vision_resampler: RoboVLMs' own resampler stands behind Kosmos-2's.
        told: the (class) head hears the instruction too.
        base_weights: write model.safetensors into the base directory.
        seed: of all random numbers.
    """

    size: Size = "tiny"
    layout: FileLayout = "upstream"
    head: HeadKind = "actions_gripper"
    lora: bool = True
    peft: PeftNaming = "new"
    hand_camera: bool = False
    latent: int = 1
    pooling: bool = False
    action_dim: int | None = None
    hidden_size: int | None = None
    vision_resampler: bool = False
    told: bool = False
    base_weights: bool = True
    seed: int = 0

    @property
    def outputs(self) -> int:
        return _OUTPUTS[self.head] if self.action_dim is None else self.action_dim

    @property
    def hidden(self) -> int:
        return _HIDDEN[self.size] if self.hidden_size is None else self.hidden_size


@dataclass(frozen=True)
class Dimensions:
    """What a size stands for: Kosmos-2's dimensions, LoRA rank and alpha."""

    kosmos: Kosmos2Config
    lora_r: int
    lora_alpha: int

    @property
    def lora_scaling(self) -> float:
        return self.lora_alpha / self.lora_r


def dimensions(size: Size) -> Dimensions:
    """The numbers behind a size. `tiny` has the widths of the recorded reference cases."""
    if size == "full":
        return Dimensions(Kosmos2Config(), lora_r=32, lora_alpha=16)
    if size == "small":
        kosmos = _kosmos(text=(512, 6, 8), vision=(256, 6, 4))
        return Dimensions(kosmos, lora_r=8, lora_alpha=16)
    return Dimensions(_kosmos(text=(64, 2, 4), vision=(48, 3, 4)), lora_r=4, lora_alpha=8)


def state_keys(options: SyntheticOptions) -> list[Key]:
    """The state dict of a checkpoint, in the file's order. Works on the meta device: `full` costs no memory.

    Raises:
        ConfigError: a latent or a width of actions that no head can have.
    """
    _check(options)
    sizes = dimensions(options.size)
    rank = sizes.lora_r if options.lora else None
    return layout_keys(
        sizes.kosmos, head_spec(options), chunk=CHUNK, rank=rank, peft=options.peft, resampler=options.vision_resampler
    )


def head_spec(options: SyntheticOptions) -> HeadSpec:
    """The head that the options ask for."""
    sizes = options.outputs, options.hidden, _LSTM_LAYERS, options.latent
    return HeadSpec(options.head, *sizes, options.pooling, options.told)


def is_trained(name: str) -> bool:
    """Whether a parameter, by its canonical name, has an optimizer state: the backbone is always frozen."""
    return not name.startswith("backbone.") or ".lora_" in name


def _check(options: SyntheticOptions) -> None:
    least = 2 if options.head == "actions_gripper" else 1
    if options.latent < 1 or options.hidden < 1 or options.outputs < least:
        raise ConfigError(
            "no policy has these dimensions",
            got=f"latent {options.latent}, action_dim {options.outputs}, hidden_size {options.hidden}",
            expected=f"at least 1, {least} for {options.head}, and 1",
            hint="leave them out to get the usual ones.",
        )


def _kosmos(*, text: tuple[int, int, int], vision: tuple[int, int, int]) -> Kosmos2Config:
    """Dimensions from (width, layers, heads) of both towers; the rest as in Kosmos-2, with a small vocabulary."""
    width, layers, heads = text
    vision_width, vision_layers, vision_heads = vision
    return Kosmos2Config(
        text_config={
            "vocab_size": 1200,
            "embed_dim": width,
            "layers": layers,
            "attention_heads": heads,
            "ffn_dim": (2 if width < 128 else 4) * width,
        },
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "intermediate_size": (2 if width < 128 else 4) * vision_width,
        },
    )
