"""Schedules and rates, against the published system's values and their closed forms."""

import itertools
import json
from typing import get_args

import numpy as np
import pytest
from places import ROOT

from alphaflow_cli.core.alpha import PROGRESS, clamped, equal_rows, schedule_value
from alphaflow_cli.core.rates import learning_rate
from alphaflow_cli.recipe.schema import ScheduleKind

GOLDEN = ROOT / "tests" / "golden"
SCHEDULERS = json.loads((GOLDEN / "schedulers.json").read_text())
RECIPES = json.loads((GOLDEN / "alpha_recipes.json").read_text())
MISC = np.load(GOLDEN / "misc.npz")


def from_golden(cfg, step):
    return schedule_value(
        step,
        kind=cfg["scheduler"],
        initial=cfg["initial_value"],
        final=cfg["end_value"],
        start=cfg["change_init_steps"],
        end=cfg["change_end_steps"],
        gamma=cfg["gamma"],
        clamp=cfg["clamp_value"],
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kind_equals_the_published_schedule(name):
    case = SCHEDULERS[name]
    ours = [from_golden(case["cfg"], step) for step in case["steps"]]
    np.testing.assert_allclose(ours, case["value"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_recipes_have_their_alpha_and_their_rows(name):
    case = RECIPES[name]
    ours = [from_golden(case["alpha_cfg"], step) for step in case["steps"]]
    np.testing.assert_allclose(ours, case["alpha"], rtol=0, atol=1e-12)
    share = from_golden(case["ratio_fm_cfg"], 0)
    assert share == case["ratio_fm"]
    assert {b: equal_rows(int(b), share) for b in case["n_fm_for_batch"]} == case["n_fm_for_batch"]


def test_the_published_change_of_phase_is_exact_to_the_step():
    case = RECIPES["alphaflow-sigmoid-latentspace-B-2"]
    below, zero = case["first_step_alpha_below_1"], case["first_step_alpha_zero"]
    values = [from_golden(case["alpha_cfg"], step) for step in (below - 1, below, zero - 1, zero)]
    assert values[0] == 1.0 > values[1]
    assert values[2] > 0.0 == values[3]


def test_every_kind_of_the_schema_has_a_formula():
    assert {"constant", "step", *PROGRESS} == set(get_args(ScheduleKind))


@pytest.mark.parametrize("kind", [k for k in get_args(ScheduleKind) if k != "constant"])
def test_start_equal_to_end_is_a_jump(kind):
    def at(step):
        return schedule_value(step, kind=kind, initial=0.9, final=0.1, start=50, end=50, gamma=25.0, clamp=0.0)

    assert [at(49), at(50), at(51)] == [0.9, 0.1, 0.1]


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
@pytest.mark.parametrize(("initial", "final"), [(1.0, 0.01), (0.01, 1.0)])
def test_every_kind_is_monotone_and_stays_between_its_ends(kind, initial, final):
    values = [
        schedule_value(s, kind=kind, initial=initial, final=final, start=10, end=90, gamma=3.0, clamp=0.0)
        for s in range(100)
    ]
    sign = 1 if final > initial else -1
    assert all(sign * (b - a) >= 0 for a, b in itertools.pairwise(values))
    assert min(values) >= 0.01
    assert max(values) <= 1.0


def test_a_very_steep_sigmoid_does_not_overflow():
    value = schedule_value(1, kind="sigmoid", initial=1.0, final=0.0, start=0, end=100, gamma=1e6, clamp=0.0)
    assert value == 1.0


def test_the_clamp_is_strict_on_both_sides():
    assert [clamped(v, 0.005) for v in (0.005, 0.00499, 0.995, 0.9951, 0.5)] == [0.005, 0.0, 0.995, 1.0, 0.5]


def test_the_learning_rate_equals_the_published_one():
    rates = [
        learning_rate(s, lr=1e-4, final_lr=None, warmup_steps=10_000, warmup_from="step", steps=400_000)
        for s in MISC["lr/recipe_steps"]
    ]
    np.testing.assert_allclose(rates, MISC["lr/recipe_lr"], rtol=1e-12)
    rates = [learning_rate(s, lr=1e-4, final_lr=1e-4, warmup_steps=10, warmup_from="step", steps=40) for s in range(60)]
    np.testing.assert_allclose(rates, MISC["lr/recipe_lr1e-4_final1e-4_warm10_max40"], rtol=1e-12)


def test_the_cosine_reaches_its_final_rate_at_the_last_step():
    rates = [learning_rate(s, lr=3e-4, final_lr=1e-5, warmup_steps=10, warmup_from="step", steps=40) for s in range(60)]
    np.testing.assert_allclose(rates, MISC["lr/lr3e-4_final1e-5_warm10_max40"], rtol=1e-12)
    assert rates[40] == pytest.approx(1e-5)


def test_no_warm_up_starts_at_the_full_rate():
    assert learning_rate(0, lr=2e-4, final_lr=None, warmup_steps=0, warmup_from="step", steps=10) == 2e-4
