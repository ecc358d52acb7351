"""What a checkpoint's adapters multiply with: scale, ranks and form, from its training config or from peft's own adapter_config.json.

Parity cannot see a wrong scale where reference and engine share it, so every field that changes the product is honoured as peft honours
it, or refused by its name. Fields of newer versions of peft are refused unless they have peft's own default.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from bundle.errors import ConfigError, UnsupportedPolicyError

# Where adapters go, how they train and what they are called: the tensors in the file say it, or nothing of it is left in the product.
_HARMLESS = frozenset(
    (
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "modules_to_save", "layers_to_transform",
        "layers_pattern", "runtime_config", "megatron_core", "eva_config", "velora_config", "ensure_weight_tying", "fan_in_fan_out",
        "qalora_group_size",
    )
)  # fmt: skip
_READ = frozenset(("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "init_lora_weights"))
# Initialisations that take the adapters' start out of the base: W is then no longer the published weight.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Patterns are tried on each of some 300 modules, whose names have up to 60 characters.
_LONGEST_PATTERN, _MOST_PATTERNS, _MOST_REPETITIONS, _MOST_REPEATING = 256, 400, 2, 32
_REPETITION = re.compile(r"(?<!\\)[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(LoraConfig)}


@dataclass(frozen=True)
class AdapterRecipe:
    """How adapters enter the product: W + scaling (B A), per module.

    Attributes:
        r, alpha: of modules that no pattern names.
        rslora: scaling is alpha / sqrt(r) instead of alpha / r.
        dora: magnitudes are expected.
        lora_bias: adapters have biases of their own.
        rank_pattern, alpha_pattern: r and alpha of modules whose path ends in a key (peft's matching).
        residual: the initialisation that changed the base, or None.
        bias: which biases trained: none, lora_only or all.
    """

    r: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    residual: str | None = None
    bias: str = "none"

    @property
    def plain(self) -> bool:
        """Whether W + (alpha / r) B A with one alpha and one r says it all."""
        return not (self.rslora or self.dora or self.lora_bias or self.rank_pattern or self.alpha_pattern)

    def rank(self, module: str) -> int:
        """r of a module, by its path below the base model."""
        return int(self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), module), self.r))

    def module_alpha(self, module: str) -> float:
        """alpha of a module."""
        return float(self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), module), self.alpha))

    def scaling(self, module: str) -> float:
        """What B A is multiplied with in a module."""
        rank, alpha = self.rank(module), self.module_alpha(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def recipe_of_setup(setup: Mapping[str, Any]) -> AdapterRecipe:
    """The recipe in `train_setup` of a lab's config, where peft's fields may stand as they are called or with `lora_` before them.

    Raises:
        ConfigError: a field has a value of the wrong type.
        UnsupportedPolicyError: a field that changes the product, and that jetvla does not merge.
    """
    names = (*_DEFAULTS, "r", "lora_alpha")
    fields: dict[str, tuple[str, Any]] = {}
    for name in names:
        for key in (f"lora_{name}", name):
            if key in setup and name not in _HARMLESS:
                fields[name] = (f"train_setup.{key}", setup[key])
    bias = setup.get("lora_bias", "none")
    fields.pop("lora_bias", None)
    fields.pop("bias", None)
    if isinstance(bias, bool):  # peft has a field of that name; RoboVLMs means by it which biases train
        fields["lora_bias"] = ("train_setup.lora_bias", bias)
        bias = "none"
    return _recipe(setup.get("lora_r"), setup.get("lora_alpha"), bias, fields, prefix="train_setup.lora_")


def recipe_of_peft(values: Mapping[str, Any], *, origin: str) -> AdapterRecipe:
    """The recipe in peft's adapter_config.json.

    Raises:
        ConfigError, UnsupportedPolicyError: as `recipe_of_setup`.
    """
    if values.get("peft_type") != "LORA":
        raise UnsupportedPolicyError(
            f"{origin} describes other adapters than LoRA",
            got=f"peft_type {values.get('peft_type')!r}",
            expected="LORA (with DoRA, rsLoRA and patterns)",
            hint="merge them with peft's merge_and_unload and save the merged weights.",
        )
    fields = {name: (f"{origin}: {name}", value) for name, value in values.items() if name not in _HARMLESS}
    return _recipe(values.get("r"), values.get("lora_alpha"), values.get("bias", "none"), fields, prefix=f"{origin}: ")


def _recipe(
    r: object, alpha: object, bias: object, fields: Mapping[str, tuple[str, Any]], *, prefix: str
) -> AdapterRecipe:
    for name, (key, value) in fields.items():
        if name not in _READ and value not in (None, False, "", _DEFAULTS.get(name)) and value not in ({}, []):
            raise UnsupportedPolicyError(
                f"{key} = {value!r} changes what adapters compute, and is not merged here",
                expected="LoRA, rsLoRA, DoRA, rank_pattern, alpha_pattern, lora_bias",
                hint="merge the adapters with peft's merge_and_unload and save the merged weights.",
            )

    def flag(name: str) -> bool:
        key, value = fields.get(name, (name, False))
        if value is not None and not isinstance(value, bool):
            raise _unusable(key, value, "true or false")
        return bool(value)

    def pattern(name: str) -> dict[str, Any]:
        key, value = fields.get(name, (name, None))
        numbers = isinstance(value, dict) and all(
            isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
            for number in value.values()
        )
        if value is not None and not numbers:
            raise _unusable(key, value, "an object of positive numbers by module name")
        _check_patterns(key, value or {})
        return dict(value or {})

    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise _unusable(f"{prefix}r", r, "a whole number, at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _unusable(f"{prefix}alpha", alpha, "a finite number")
    if bias not in ("none", "lora_only", "all"):
        raise _unusable(f"{prefix}bias", bias, "none, lora_only or all")
    start = fields.get("init_lora_weights", ("", None))[1]
    residual = start if isinstance(start, str) and start.lower().startswith(_RESIDUAL) else None
    return AdapterRecipe(
        r=r,
        alpha=float(alpha),
        rslora=flag("use_rslora"),
        dora=flag("use_dora"),
        lora_bias=flag("lora_bias"),
        rank_pattern=pattern("rank_pattern"),
        alpha_pattern=pattern("alpha_pattern"),
        residual=residual,
        bias=str(bias),
    )


def _check_patterns(key: str, patterns: Mapping[str, Any]) -> None:
    """Refuse regular expressions that would be tried for ever: a repetition inside a repeated group, or many of them."""
    repeating = 0
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise _unusable(key, pattern, f"module names or regular expressions ({error})") from None
        repetitions = len(_REPETITION.findall(pattern))
        repeating += repetitions > 0
        if len(pattern) > _LONGEST_PATTERN or repetitions > _MOST_REPETITIONS or _REPEATED_GROUP.search(pattern):
            expected = (
                f"at most {_MOST_REPETITIONS} repetitions in {_LONGEST_PATTERN} characters, and no repeated group"
            )
            raise _unusable(key, pattern, expected)
    if len(patterns) > _MOST_PATTERNS or repeating > _MOST_REPEATING:
        raise _unusable(
            key,
            f"{len(patterns)} patterns, {repeating} with repetitions",
            f"at most {_MOST_PATTERNS}, {_MOST_REPEATING}",
        )


def _unusable(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"`{key}` is not usable",
        got=repr(value),
        expected=expected,
        hint="pass the config that the run was trained with.",
    )
