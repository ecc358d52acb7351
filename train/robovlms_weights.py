"""What a lab's config starts from: `pretrained_vlm_path` and `model_load_path`, as the code that reads them does.

The fork reads `pretrained_vlm_path` only with `load_vlm_only`, takes the vision-language part and leaves the head new; it goes on in
silence where the file is not there, which is refused here. `model_load_path` is loaded after that, over everything that it holds: head,
action token and adapters too. RoboVLMs takes what fits and goes on without the rest; here what does not fit is an error.
"""

from __future__ import annotations

from typing import Any

from train.robovlms_keys import LabConfig

_SOURCES = ("torch", "lightning", "deepspeed")


def weights_settings(lab: LabConfig) -> dict[str, Any]:
    """`weights` and `take` of the section `base`; nothing where training starts from Kosmos-2 itself.

    Raises:
        ConfigError: a source that RoboVLMs does not know.
    """
    part, whole = lab.get("pretrained_vlm_path"), lab.get("model_load_path")
    if part and not lab.get("load_vlm_only", False):
        lab.assume("without effect: pretrained_vlm_path; the fork's code reads it only where load_vlm_only is true")
        part = None
    if whole:
        if lab.get("model_load_source", "torch") not in _SOURCES:
            raise lab.unusable("model_load_source", expected=", ".join(_SOURCES))
        if part:
            lab.assume("without effect: pretrained_vlm_path; model_load_path is loaded over it")
        lab.name("base.weights", "model_load_path")
        return {"weights": whole, "take": "policy"}
    if part:
        lab.name("base.weights", "pretrained_vlm_path")
        return {"weights": part, "take": "backbone"}
    return {}
