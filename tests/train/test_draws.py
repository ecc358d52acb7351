"""Draws are the same everywhere and always."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from train.draws import draw_number, draw_uniform


def test_the_numbers_are_those_that_runs_were_made_with() -> None:
    # Written down: another number here means that no older run resumes exactly.
    assert draw_number("order", 0, 1, 2) == 7670723384800746
    assert draw_uniform("mirror", -1) == 0.9679928269350186


def test_hash_randomization_of_python_changes_nothing() -> None:
    program = "from train.draws import draw_number; print(draw_number('order', 0, 1, 2))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{draw_number('order', 0, 1, 2)}\n"}


def test_keys_are_not_confused() -> None:
    assert len({draw_number("a", 1, 2), draw_number("a", 12), draw_number("a1", 2), draw_number("a", "1", 2)}) == 4
    assert draw_number("a", np.int64(3)) == draw_number("a", 3)


def test_uniform_is_uniform() -> None:
    values = np.array([draw_uniform("test", index) for index in range(4000)])
    assert 0 <= values.min() < values.max() < 1
    np.testing.assert_allclose(np.histogram(values, 10, (0, 1))[0] / 4000, 0.1, atol=0.02)
