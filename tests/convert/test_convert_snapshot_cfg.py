"""What a published snapshot says beside its weights is read, and what contradicts it is refused."""

import copy
import json
import time

import pytest
import torch
from golden_data import FOLDER
from snapshots import published_snapshot

from alphaflow_cli.convert import ConvertOptions, convert, export
from alphaflow_cli.convert.snapshot_cfg import walk_cfg
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.sample.walk import plan_walk

SIGMOID = {
    "scheduler": "sigmoid", "initial_value": 1.0, "end_value": 0, "change_init_steps": 600_000,
    "change_end_steps": 1_000_000, "gamma": 25.0, "clamp_value": 0.005, "discrete_training": False,
    "up_clamp_value": None,
}  # fmt: skip


def constant(value):
    return SIGMOID | {"scheduler": "constant", "initial_value": value, "end_value": value, "gamma": 1.0,
                      "change_init_steps": 0, "change_end_steps": 0, "clamp_value": 0.0}  # fmt: skip


SAMPLING = {
    "name": "recflow", "num_steps": 2, "eps": 0.0, "sigma_noise": 1.0, "time_shifting": 1.0, "real_init": False,
    "custom_t_steps": [1, 0.55, 0], "enable_trajectory_sampling": True, "enable_consistency_sampling": True,
    "cfg": {"scale": 1.0, "t_min": 0.0, "t_max": 1.0},
}  # fmt: skip
XL = {"omega": 0.2, "kappa": 0.92, "t_min": 0.0, "t_max": 0.75}


def snapshot(*, dropout=0.1, sampling=SAMPLING, loss=None, **more):
    """The fixture's snapshot with what a run leaves in cfg, stats and the optimiser."""
    tree = published_snapshot(dropout=dropout)
    full = {"cfg_params": XL, "alpha_cfg": SIGMOID, "ratio_fm_cfg": constant(0.5)}
    tree["cfg"] |= {"loss": full if loss is None else loss, "sampling": sampling}
    tree["cfg"] |= {"training": {"max_steps": 1_200_000, "wandb": True}, "env": {"seed": 1}} | more
    tree["stats"] = {"cur_step": 1_200_000, "cur_kimg": 3.5}
    group = {"lr": 1e-9, "initial_lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    tree["optimizer"] = {"state": {}, "param_groups": [group]}
    return tree


def converted(tmp_path, tree, *sets, name="mine.pt", **options):
    torch.save(tree, tmp_path / name)
    outcome = convert(tmp_path / name, tmp_path / "ours.safetensors", ConvertOptions(sets=sets, **options))
    return outcome, load_checkpoint(tmp_path / "ours.safetensors")


def test_guidance_schedules_step_optimiser_and_sampler_are_read_from_the_file(tmp_path):
    outcome, checkpoint = converted(tmp_path, snapshot())
    recipe = checkpoint.recipe
    mix, alpha = recipe.guidance, recipe.alpha
    assert (mix.omega, mix.kappa, mix.t_min, mix.t_max, mix.label_dropout) == (0.2, 0.92, 0.0, 0.75, 0.1)
    assert (alpha.kind, alpha.initial, alpha.final, alpha.start, alpha.end) == ("sigmoid", 1, 0, 600_000, 1_000_000)
    assert (alpha.gamma, alpha.clamp, recipe.train.steps) == (25.0, 0.005, 1_200_000)
    assert (recipe.times.equal_share.kind, recipe.times.equal_share.initial) == ("constant", 0.5)
    assert (recipe.optim.lr, recipe.optim.betas) == (2e-4, (0.9, 0.95))
    assert checkpoint.origin["step"] == 1_200_000
    walk = plan_walk(recipe, nfe=2)
    assert (walk.sampler, walk.grid) == ("consistency", (1.0, 0.55, 0.0))
    assert outcome.stated.keys() >= {"stats.cur_step", "loss.cfg_params.omega", "loss.alpha_cfg", "optimizer.betas"}
    assert outcome.unread == (
        "cfg.env", "cfg.sampling.cfg", "cfg.sampling.eps", "cfg.sampling.name", "cfg.sampling.real_init",
        "cfg.sampling.time_shifting", "cfg.training.wandb",
    )  # fmt: skip


def test_the_published_schedules_are_those_of_the_shipped_recipes(tmp_path):
    published = json.loads((FOLDER / "alpha_recipes.json").read_text())
    for kind, recipe in (("meanflow", "meanflow-b2"), ("sigmoid", "b2")):
        theirs = published[f"alphaflow-{kind}-latentspace-B-2"]
        loss = {"alpha_cfg": theirs["alpha_cfg"], "ratio_fm_cfg": theirs["ratio_fm_cfg"]}
        tree = snapshot(dropout=0.0, loss=loss, training={"max_steps": theirs["max_steps"]})
        converted(tmp_path, tree, recipe=recipe)
        (tmp_path / "ours.safetensors").unlink()
        other = {"meanflow-b2": "b2", "b2": "meanflow-b2"}[recipe]
        with pytest.raises(AlphaflowError, match=rf"says alpha .*, --recipe {other} says"):
            converted(tmp_path, tree, recipe=other)


@pytest.mark.parametrize(
    ("name", "recipe", "change", "message"),
    [("mine.pt", "b2-cfg", {}, r"says guidance\.omega 0\.2, --recipe b2-cfg says 1\.0"),
     ("alphaflow-B-2-cfg.pt", None, {}, r"says guidance\.omega 0\.2, recipe b2-cfg, which the file's name means"),
     ("alphaflow-B-2.pt", None, {}, r"guidance\.omega 0\.2"),
     ("meanflow-XL-2-cfg.pt", None, {}, r"says alpha sigmoid 1 to 0 .*, recipe meanflow-xl2-cfg"),
     ("alphaflow-XL-2-cfg.pt", None, {"ratio_fm_cfg": constant(0.25)}, r"times\.equal_share constant 0\.25"),
     ("alphaflow-XL-2-cfg.pt", None, {"cfg_params": XL | {"t_max": 0.8}}, r"guidance\.t_max 0\.8")],
)  # fmt: skip
def test_a_recipe_or_a_name_that_contradicts_the_file_is_refused(tmp_path, name, recipe, change, message):
    tree = snapshot()
    tree["cfg"]["loss"] = tree["cfg"]["loss"] | change
    with pytest.raises(AlphaflowError, match=message):
        converted(tmp_path, tree, name=name, recipe=recipe)
    assert not (tmp_path / "ours.safetensors").exists()


def test_a_recipe_without_labels_dropped_contradicts_a_file_that_drops_them(tmp_path):
    with pytest.raises(AlphaflowError, match=r"says label_dropout 0\.1, --recipe b2 says 0"):
        converted(tmp_path, snapshot(loss={}), recipe="b2")


@pytest.mark.parametrize(("name", "recipe"), [("alphaflow-XL-2-cfg.pt", None), ("mine.pt", "xl2-cfg")])
def test_a_recipe_or_a_name_that_agrees_is_taken(tmp_path, name, recipe):
    _, checkpoint = converted(tmp_path, snapshot(), name=name, recipe=recipe)
    assert checkpoint.recipe.guidance.t_max == 0.75


def test_the_guided_meanflow_of_b2_is_a_released_name(tmp_path):
    outcome, checkpoint = converted(tmp_path, published_snapshot(dropout=0.1), name="meanflow-B-2-cfg.pt")
    assert outcome.filled["recipe"].startswith("meanflow-b2-cfg (the file's name)")
    assert (checkpoint.recipe.guidance.omega, checkpoint.recipe.guidance.kappa) == (1.0, 0.5)


@pytest.mark.parametrize("share", [1, 1.0, constant(1.0)])
def test_a_flow_matching_snapshot_samples_with_flow(tmp_path, share):
    key = "ratio_fm_cfg" if isinstance(share, dict) else "ratio_fm"
    sampling = SAMPLING | {"num_steps": 50, "custom_t_steps": None, "enable_consistency_sampling": False,
                           "enable_trajectory_sampling": False}  # fmt: skip
    tree = snapshot(dropout=0.0, sampling=sampling, loss={"alpha_cfg": SIGMOID, key: share})
    _, checkpoint = converted(tmp_path, tree)
    recipe = checkpoint.recipe
    assert (recipe.sample.sampler, recipe.sample.nfe, recipe.times.equal_share.initial) == ("flow", 50, 1.0)
    assert (recipe.alpha.kind, recipe.alpha.initial) == ("constant", 1.0)
    for nfe in (1, 2, 50):
        assert plan_walk(recipe, nfe=nfe).sampler == "flow"


def test_a_preview_by_plain_flow_does_not_make_a_few_step_model_a_flow(tmp_path):
    sampling = SAMPLING | {"num_steps": 256, "custom_t_steps": None, "enable_consistency_sampling": False,
                           "enable_trajectory_sampling": False}  # fmt: skip
    outcome, checkpoint = converted(tmp_path, snapshot(sampling=sampling))
    assert checkpoint.recipe.sample.sampler == "trajectory"
    assert "cfg.sampling" in outcome.unread


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [("sampling", "sigma_noise", 0.5, r"cfg\.sampling\.sigma_noise is 0\.5"),
     ("loss", "sigma_noise", "two", r"cfg\.loss\.sigma_noise is two"),
     ("model", "precond", "edm", r"cfg\.model\.precond is 'edm'"),
     ("loss", "precond", {"name": "edm", "sigma_data": 0.5}, r"cfg\.loss\.precond is 'edm'"),
     ("model", "prediction", "x", r"cfg\.model\.prediction is 'x'; only a velocity"),
     ("loss", "pred_type", "eps", r"cfg\.loss\.pred_type is 'eps'"),
     ("loss", "predict_x0", True, r"cfg\.loss\.predict_x0 is on")],
)  # fmt: skip
def test_another_network_than_ours_is_refused(tmp_path, section, key, value, message):
    tree = copy.deepcopy(snapshot())
    tree["cfg"][section][key] = value
    with pytest.raises(AlphaflowError, match=message):
        converted(tmp_path, tree)


@pytest.mark.parametrize(
    ("loss", "message"),
    [({"alpha_cfg": SIGMOID | {"scheduler": "cosine"}}, "a schedule of kind 'cosine'"),
     ({"alpha_cfg": SIGMOID | {"up_clamp_value": 0.9}}, "up_clamp_value or discrete_training"),
     ({"alpha_cfg": SIGMOID | {"initial_value": "one"}}, "initial_value one, not a finite number"),
     ({"cfg_params": XL | {"omega": float("nan")}}, "omega nan, not a finite number"),
     ({"cfg_params": XL | {"omega": 10**400}}, "omega a number of more than 15 digits, not a finite number"),
     ({"cfg_params": XL | {"omega": torch.zeros(2, 2)}}, r"omega a tensor of shape \(2, 2\), not a finite number"),
     ({10**400: 1, "precond": 10**400}, r"cfg\.loss\.precond is 'a number of more than 15 digits'"),
     ({"cfg_params": XL | {"kappa": 1.5}}, r"guidance\.kappa must be 0 or more and less than 1")],
)  # fmt: skip
def test_a_configuration_that_means_nothing_here_is_named(tmp_path, loss, message):
    with pytest.raises(AlphaflowError, match=message):
        converted(tmp_path, snapshot(loss={"cfg_params": XL} | loss))


def test_a_configuration_that_holds_itself_is_read_once(tmp_path):
    tree = snapshot()
    tree["cfg"]["loop"] = tree["cfg"]
    converted(tmp_path, tree)


def test_a_configuration_without_end_is_walked_in_no_time(tmp_path):
    tree = snapshot()
    deep = tree["cfg"]
    for _ in range(20_000):
        deep["deeper"] = {}
        deep = deep["deeper"]
    tree["cfg"]["wide"] = {i: dict.fromkeys(range(100), 0) for i in range(1500)}
    started = time.perf_counter()
    walked = dict(walk_cfg(tree["cfg"]))
    assert len(walked) <= 100_000
    assert time.perf_counter() - started < 5


def test_guidance_of_the_previews_is_the_samplers_where_none_is_built_in(tmp_path):
    sampling = SAMPLING | {"cfg": {"scale": 1.5, "t_min": 0.0, "t_max": 1.0}}
    loss = {"cfg_params": {"omega": 1.0, "kappa": 0.0}, "ratio_fm": 1.0}
    outcome, checkpoint = converted(tmp_path, snapshot(loss=loss, sampling=sampling))
    assert checkpoint.recipe.sample.guidance == 1.5
    assert outcome.stated["sampling.cfg.scale"] == 1.5
    (tmp_path / "ours.safetensors").unlink()
    _, checkpoint = converted(tmp_path, snapshot(sampling=sampling))
    assert checkpoint.recipe.sample.guidance == 1.0


def test_the_way_back_keeps_the_guidance_of_the_sampler_and_names_the_two_steps_that_it_loses(tmp_path, capsys):
    sampling = SAMPLING | {"cfg": {"scale": 1.5, "t_min": 0.0, "t_max": 1.0}}
    converted(tmp_path, snapshot(loss={"cfg_params": {"omega": 1.0, "kappa": 0.0}}, sampling=sampling))
    export(tmp_path / "ours.safetensors", tmp_path / "back.pt")
    assert "no place for sample.two_step_sampler, sample.two_step_times: " in capsys.readouterr().err
    again = convert(tmp_path / "back.pt", tmp_path / "again.safetensors", ConvertOptions())
    assert again.recipe.sample.guidance == 1.5


def test_the_scores_that_a_recipe_expects_are_not_given_to_another_network(tmp_path):
    for options in ({}, {"recipe": "xl2-cfg"}, {"name": "alphaflow-XL-2-cfg.pt"}):
        _, checkpoint = converted(tmp_path, snapshot(), **options)
        assert checkpoint.recipe.expected == ()
        (tmp_path / "ours.safetensors").unlink()


def test_tensors_where_plain_values_are_due_are_not_compared(tmp_path):
    odd = torch.zeros(2)
    loss = {"cfg_params": {"omega": 1.0, "kappa": 0.0}, "predict_x": odd, "precond": None, "name": odd}
    sampling = {"num_steps": odd, "custom_t_steps": odd, "enable_trajectory_sampling": odd,
                "cfg": {"scale": 1.5, "t_min": odd, "t_max": 1.0}}  # fmt: skip
    tree = snapshot(loss=loss, sampling=sampling, training={"max_steps": odd})
    tree["stats"]["cur_step"] = odd
    tree["optimizer"]["param_groups"] = [{"initial_lr": odd, "betas": (odd, odd), "eps": odd}]
    _, checkpoint = converted(tmp_path, tree)
    assert "step" not in checkpoint.origin
    (tmp_path / "ours.safetensors").unlink()
    with pytest.raises(AlphaflowError, match="up_clamp_value or discrete_training"):
        converted(tmp_path, snapshot(loss={"alpha_cfg": SIGMOID | {"discrete_training": odd}}))


def test_no_guidance_and_no_time_for_it_are_the_same(tmp_path):
    for mix in ({"omega": 1.0, "kappa": 0.0, "t_min": 0.0, "t_max": 0.0}, XL | {"t_max": -1.0}):
        _, checkpoint = converted(tmp_path, snapshot(dropout=0.0, loss={"cfg_params": mix}))
        assert (checkpoint.recipe.guidance.omega, checkpoint.recipe.guidance.kappa) == (1.0, 0.0)
        (tmp_path / "ours.safetensors").unlink()
