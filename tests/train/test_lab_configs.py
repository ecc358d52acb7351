"""Every public training config trains, or is refused by the name of the one thing that is not done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.lab_configs import fate, lab_configs, table

ROOT = Path(__file__).resolve().parents[2]
# Config -> the key that its refusal names.
REFUSED = {
    "MoNaVLA__bbox_nav_exp53_clip_lora": "nor one of RoboVLMs",
    "MoNaVLA__mobile_vla_v5_exp10_bbox": "train_setup.predict_action = False",
    "vla__brown_pot_left": "`window_size`, `fwd_pred_next_n`",
    "vla__mobile_vla_no_chunk_abs_20251210": "train_dataset.abs_action = True",
    "vla__mobile_vla_unified_class_win12_k6": "act_head.action_space = 'discrete'",
}
CONFIGS = lab_configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_or_names_the_one_thing(name: str, tmp_path: Path) -> None:
    trains, _, said = fate(CONFIGS[name], tmp_path)
    assert trains == (name not in REFUSED)
    if not trains:
        assert REFUSED[name] in said


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    """`python -m tests.train.lab_configs > docs/lab-configs.md` makes it again."""
    assert (ROOT / "docs" / "lab-configs.md").read_text(encoding="utf-8") == table(tmp_path)
