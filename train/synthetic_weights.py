"""Random weights under which the policy behaves like a trained one.

A parity test on a net whose signals die out, or on adapters that are zero, proves nothing. Here every tensor counts:
activations keep their size through all layers, attention picks some slots over others, gammas and biases are away from
1 and 0, adapters move the output, tanh heads are not saturated, and the action depends on the image, the instruction
and the history. Each tensor has its own random stream, seeded by its name, so every layout holds the same policy.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Size of an adapter's output relative to its Linear's: visible, not dominant.
_ADAPTER_GAIN = 0.3
_ADAPTER = re.compile(r"\.lora_([AB])\.weight$")

_Unit = Literal["output", "entry", "row", "image"]


@dataclass(frozen=True)
class _Rule:
    """Entries are normal around `mean`; what `gain` is the size of depends on `unit`.

    `output`: of the outputs for inputs of size 1, so entries have gain / sqrt(fan-in). `entry`: of the entries. `row`:
    of a row as a vector. `image`: of the outputs as vectors; image tokens share a sequence with embeddings of length 1.
    """

    pattern: re.Pattern[str]
    gain: float
    mean: float
    unit: _Unit


def _rule(pattern: str, gain: float, unit: _Unit = "output", *, mean: float = 0.0) -> _Rule:
    return _Rule(re.compile(pattern), gain, mean, unit)


# The first match counts. q and k of gain g give attention logits of deviation g * g. What is added to the residual
# stream is kept small, so that the stream grows by a factor of two or three over 48 additions. LSTM outputs are small,
# so what follows them amplifies.
_RULES = (
    _rule(r"(norm\d?|layrnorm|_ln)\.weight$", 0.15, "entry", mean=1.0),
    _rule(r"(embed_tokens\.weight|action_token)$", 1.0, "row"),
    _rule(r"class_embedding$", 0.5, "entry"),
    _rule(r"position_embedding\.weight$", 0.4, "entry"),
    _rule(r"latent_query$", 1.0, "entry"),
    # Its inputs are vectors of length 1, so entries of size 1 make outputs of size 1.
    _rule(r"projection\.dense\.weight$", 1.0, "entry"),
    _rule(r"x_attn\.[qk]_proj\.weight$", 1.4),
    _rule(r"x_attn\.out_proj\.weight$", 2.0, "image"),
    _rule(r"x_attn\.out_proj\.bias$", 0.1, "row"),
    _rule(r"act_head\.rnn\.weight_ih_l0$", 1.5),
    _rule(r"act_head\.rnn\.weight_ih_l\d+$", 3.0),
    _rule(r"act_head\.rnn\.weight_hh_l\d+$", 1.5),
    _rule(r"act_head\.\w+\.mlp\.0\.weight$", 2.5),
    _rule(r"act_head\.\w+\.mlp\.6\.weight$", 1.0),
    _rule(r"act_head\.\w+\.mlp\.\d\.weight$", 1.4),
    _rule(r"act_head\.logits\.weight$", 3.0),
    # Its input is a mean of embeddings, a vector shorter than 1.
    _rule(r"act_head\.instr_proj\.weight$", 5.0),
    _rule(r"[qk]_proj\.weight$", 1.3),
    _rule(r"(out_proj|fc2)\.weight$", 0.35),
    _rule(r"fc1\.weight$", 1.4),
    _rule(r"bias(_[ih]h_l\d+)?$", 0.1, "entry"),
    _rule(r"", 1.0),
)


def random_weight(name: str, shape: torch.Size, *, seed: int, lora_scaling: float) -> Tensor:
    """The float32 tensor of one parameter.

    Args:
        name: canonical (see train.keys), which decides its distribution and its stream.
        lora_scaling: alpha / r, so that adapters have the same effect at every rank.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    adapter = _ADAPTER.search(name)
    rule = _match(_ADAPTER.sub(".weight", name))
    if adapter is None:
        return torch.empty(shape).normal_(rule.mean, rule.gain * _entry_size(rule.unit, shape), generator=generator)
    if adapter[1] == "A":
        deviation = 1.0 if rule.unit == "entry" else shape[1] ** -0.5
    else:
        to_row = shape[0] ** -0.5 if rule.unit == "image" else 1.0
        deviation = _ADAPTER_GAIN * rule.gain * to_row * shape[1] ** -0.5 / lora_scaling
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def _match(name: str) -> _Rule:
    return next(rule for rule in _RULES if rule.pattern.search(name))


def _entry_size(unit: _Unit, shape: torch.Size) -> float:
    fan_in = shape.numel() // shape[0]
    if unit == "output":
        return float(fan_in**-0.5)
    if unit == "row":
        return float(shape[-1] ** -0.5)
    return float((fan_in * shape[0]) ** -0.5) if unit == "image" else 1.0
