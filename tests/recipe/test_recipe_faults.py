"""Broken recipes: each is refused with its one clear message, its place, exit code 1 and no traceback."""

import os
import sys
import time
from pathlib import Path

import pytest

from alphaflow_cli.cli import run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import load_recipe, recipe_from_text
from alphaflow_cli.recipe.source import MAX_FILE

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"

# text of the recipe → what the message must say (the place, then the fault)
BROKEN = {
    "wrong type": ("train: {steps: many}", "r.yaml:1: train.steps wants a whole number, got 'many'"),
    "typo": ("optim:\n  lrr: 1e-4", "r.yaml:2: unknown key 'optim.lrr'. Did you mean 'lr'?"),
    "typo of a section": ("trian: {steps: 3}", "unknown key 'trian'. Did you mean 'train'?"),
    "key of another section": ("lr: 1e-4", "unknown key 'lr'. It belongs to 'optim': optim.lr"),
    "duplicate key": ("train:\n  steps: 3\n  steps: 4", "r.yaml:3: 'steps' stands twice; the first is at r.yaml:2"),
    "duplicate section": ("train: {steps: 3}\nema: {}\ntrain: {}", "r.yaml:3: 'train' stands twice"),
    "no": ("train: {compile: no}", "train.compile wants auto, true or false, got 'no': write false"),
    "on": ("train: {tf32: on}", "train.tf32 wants true or false, got 'on': write true"),
    "on as a key": ("train:\n  on: 3", "r.yaml:2: unknown key 'train.on'"),
    "no as text": (
        "data: {store: no}",
        "data.store wants text, got 'no': YAML reads that as something else: write \"no\"",
    ),
    "exponent for a count": ("train: {steps: 1e5}", "train.steps wants a whole number, got '1e5': write 100000"),
    "fraction for a count": ("train: {batch: 2.5}", "train.batch wants a whole number, got '2.5'"),
    "octal": ("train: {batch: 010}", "leading zeros mean octal"),
    "sexagesimal": ("train: {batch: 12:30}", "train.batch wants a whole number, got '12:30'"),
    "true for a count": ("train: {steps: true}", "train.steps wants a whole number, got 'true'"),
    "count in quotes": ('train: {steps: "3"}', "train.steps wants a whole number, got '3' in quotes: leave them out"),
    "number in quotes": ('optim: {lr: "1e-4"}', "optim.lr wants a number, got '1e-4' in quotes: leave them out"),
    "not a number": ("optim: {lr: .nan}", "optim.lr wants a number, got '.nan': it must be finite"),
    "infinite": ("optim: {lr: 1e999}", "it must be finite"),
    "negative count": ("train: {steps: -5}", "train.steps must be 1 or more, got -5"),
    "huge count": ("train: {steps: 9999999999999}", "more than 1,000,000,000,000"),
    "empty value": ("train: {steps: }", "train.steps is empty, but wants a whole number"),
    "empty section": ("train:", "train is a section"),
    "list for a number": ("train: {steps: [1, 2]}", "train.steps wants a whole number, got a list"),
    "number for a list": ("ema: {half_lives: 3}", "ema.half_lives wants a list: write [3]"),
    "too short a list": ("optim: {betas: [0.9]}", "optim.betas wants 2 values, got 1"),
    "unknown choice": ("alpha: {kind: sigmoyd}", "got 'sigmoyd'. Did you mean 'sigmoid'?"),
    "fp16": ("train: {precision: fp16}", "fp16 is not offered"),
    "alpha above 1": ("alpha: {initial: 1.5}", "alpha.initial must lie between 0 and 1, got 1.5"),
    "alpha below 0": ("alpha: -0.1", "alpha.initial must lie between 0 and 1, got -0.1"),
    "alpha the kind alone": (
        "alpha: sigmoid",
        "r.yaml:1: alpha wants a number or a schedule, got 'sigmoid': write {kind: sigmoid}",
    ),
    "alpha a percentage": ("alpha: 50%", "got '50%': a schedule's steps may be percentages, its values not"),
    "start after end": ("alpha: {kind: linear, start: 60%, end: 40%}", "alpha starts at step 240,000, after its end"),
    "never ends": ("alpha: {kind: sigmoid, end: 800000}", "final value at step 800,000, but the run has 400,000 steps"),
    "step never comes": ("alpha: {kind: step, start: 400000}", 'write start: "50%" or another share'),
    "exponential to 0": ("alpha: {kind: exponential, final: 0}", "an exponential cannot start or end at 0"),
    "expected without a step": ("expected: [{value: 3}]", "expected[0].step must be 1 or more"),
    "expected is no list": ("expected: {step: 3}", "expected wants a list"),
    "expected of numbers": ("expected: [3]", "expected[0] is a section"),
    "typo in an expected score": ("expected:\n  - {step: 3, vlaue: 3}", "r.yaml:2: unknown key 'expected[0].vlaue'"),
    "empty group": ("times: {equal_share: 0.001}", "0.001 of a batch of 256 is no row at all"),
    "no r < t row": ("times: {equal_share: 1}\nalpha: 0", "leaves no row with r < t"),
    "share above 1": ("times: {equal_share: 1.2}", "times.equal_share.initial must lie between 0 and 1"),
    "dropout without labels": ("data: {classes: 0}\nguidance: {label_dropout: 0.1}", "label_dropout without labels"),
    "guidance without labels": ("data: {classes: 0}\nguidance: {kappa: 0.5}", "guidance without labels"),
    "guidance without null": ("guidance: {omega: 1, kappa: 0.5}", "needs the null label"),
    "kappa 1": ("guidance: {kappa: 1}", "guidance.kappa must be 0 or more and less than 1"),
    "empty t range": ("guidance: {t_min: 0.5, t_max: 0.5}", "t_min 0.5 is not below guidance.t_max 0.5"),
    "guided twice": (
        "guidance: {kappa: 0.5, label_dropout: 0.1}\nsample: {guidance: 2}",
        "r.yaml:2: guidance is built in by training",
    ),
    "heads": ("model: {heads: 7}", "model.heads 7 does not divide model.dim 768"),
    "patch": ("model: {patch: 3}", "model.patch 3 does not divide data.latent_size 32"),
    "pixels of latent size": ("data: {autoencoder: none, channels: 3}", "data.latent_size must be 256"),
    "pixels with 4 channels": ("data: {autoencoder: none, latent_size: 256}", "data.channels must be 3, got 4"),
    "scale without its rule": ("data: {scale: 0.18215}", "act with normalise: scale only"),
    "embedded set": ("data: {source: cats}", "'cats' is no embedded set: the form is shapes:4000"),
    "shortcut at alpha 1": ("loss: {velocity: network}", "needs alpha strictly between 0 and 1, it reaches 1"),
    "shortcut at alpha 0": ("alpha: 0\nloss: {velocity: network}", "strictly between 0 and 1, it reaches 0"),
    "gap with alpha 0": ("alpha: 0\ntimes: {gap: 1e-4}", "keeps s away from t, but alpha reaches 0"),
    "gap with a clamp to 0": (
        "alpha: {kind: exponential, final: 0.001}\ntimes: {gap: 1e-4}",
        "r.yaml:2: times.gap 0.0001 keeps s away from t, but alpha reaches 0",
    ),
    "gap of 1": ("times: {gap: 1}", "times.gap must be 0 or more and less than 1"),
    "a law of another name": ("times: {second: {law: uniforn}}", "Did you mean 'uniform'?"),
    "a draw without spread": ("times: {equal: {std: 0}}", "times.equal.std must be more than 0, got 0"),
    "a draw as a number": ("times: {second: 3}", "times.second is a section: give it lines of its own (law, mean, std"),
    "fade with an interval": (
        "guidance: {omega: 0.75, kappa: 0.75, label_dropout: 0.1, fade_from: 0.8, t_max: 0.9}",
        "fades guidance out towards t = 1, the interval (0, 0.9) cuts it off",
    ),
    "fade without guidance": ("guidance: {fade_from: 0.8}", "without guidance (omega 1, kappa 0) does nothing"),
    "fade beyond 1": ("guidance: {fade_from: 1.5}", "guidance.fade_from must lie between 0 and 1, got 1.5"),
    "plain without guidance": ("guidance: {dropped: plain, label_dropout: 0.1}", "guidance.dropped plain says what"),
    "plain without dropout": ("guidance: {omega: 0.5, kappa: 0.5, dropped: plain}", "it does nothing"),
    "power of no weight": ("alpha: 0.5\nloss: {weight: none, power: 2}", "with none it does nothing"),
    "power 0": ("loss: {power: 0}", "loss.power must be more than 0, got 0"),
    "later of no rows": ("alpha: 1\ntimes: {equal_share: 1}\nloss: {later: 0.5}", "loss.later is about r < t rows"),
    "short_first of no rows": (
        "alpha: 1\ntimes: {equal_share: 1}\nloss: {short_first: true}",
        "loss.short_first is about r < t rows",
    ),
    "constants of another count": (
        "data: {normalise: channel, channel_mean: [0, 0, 0], channel_std: [1, 1, 1]}",
        "data.channel_mean has 3 numbers, and a latent has 4 channels",
    ),
    "constants of another rule": (
        "data: {channel_mean: [0, 0, 0, 0], channel_std: [1, 1, 1, 1]}",
        "data.channel_mean acts with normalise: channel only, not position",
    ),
    "half of the constants": (
        "data: {normalise: channel, channel_mean: [0, 0, 0, 0]}",
        "data.channel_mean and data.channel_std belong together",
    ),
    "a constant of 0": (
        "data: {normalise: channel, channel_mean: [0, 0, 0, 0], channel_std: [1, 1, 0, 1]}",
        "data.channel_std must be more than 0",
    ),
    "a floor of another prediction": ("model: {t_floor: 0.1}", "model.t_floor acts with prediction: data only"),
    "a floor of 0": ("model: {prediction: data, t_floor: 0}", "model.t_floor must lie between 0 and 1, got 0"),
    "a scale that is not told": (
        "guidance: {scale: drawn, label_dropout: 0.1}",
        "guidance.scale is drawn, but the network is not told: add scale to model.inputs",
    ),
    "a scale that nobody draws": (
        "model: {inputs: [scale]}",
        "model.inputs has scale, but each row has the same: write guidance.scale: drawn",
    ),
    "an interval without a scale": (
        "model: {inputs: [interval]}\nguidance: {interval: drawn, label_dropout: 0.1}",
        "guidance.interval drawn needs a scale to draw too",
    ),
    "an interval that is not told": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, interval: drawn}",
        "add interval to model.inputs",
    ),
    "an interval that nobody draws": (
        "model: {inputs: [scale, interval]}\nguidance: {scale: drawn, label_dropout: 0.1}",
        "model.inputs has interval, but each row has the same",
    ),
    "a drawn scale without null": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn}",
        "a drawn scale needs the null label",
    ),
    "a drawn scale without labels": (
        "data: {classes: 0}\nmodel: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1}",
        "guidance without labels (data.classes is 0): write scale: fixed",
    ),
    "a drawn scale and kappa": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, kappa: 0.5}",
        "guidance.omega and kappa follow from the scale that each row draws",
    ),
    "a drawn scale that fades": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, fade_from: 0.8}",
        "guidance.fade_from fades one fixed guidance, scale drawn has many",
    ),
    "a fade with a drawn interval": (
        "model: {inputs: [scale, interval]}\n"
        "guidance: {scale: drawn, interval: drawn, label_dropout: 0.1, fade_from: 0.8}",
        "guidance.fade_from fades one fixed guidance",
    ),
    "a drawn scale, dropped plainly": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, dropped: plain}",
        "a row without label learns v in any case",
    ),
    "scales up to 1": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, scale_max: 1}",
        "guidance.scale_max must be more than 1",
    ),
    "scales below 1": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, scale_max: 0.5}",
        "guidance.scale_max must be 1 or more, got 0.5",
    ),
    "an exponent below 0": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1, scale_beta: -1}",
        "guidance.scale_beta must be 0 or more, got -1",
    ),
    "a law of no scale": (
        "guidance: {scale_beta: 2}",
        "guidance.scale_beta acts with scale: drawn only",
    ),
    "drawn ends and fixed ones": (
        "model: {inputs: [scale, interval]}\nguidance: {scale: drawn, interval: drawn, label_dropout: 0.1, t_max: 0.8}",
        "guidance.t_min and t_max are one interval, interval drawn has many",
    ),
    "guided as an input and at sampling": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1}\nsample: {guidance: 2}",
        "the network takes the scale as an input, and is asked once: write sample.scale",
    ),
    "a scale for a network without": (
        "sample: {scale: 8}",
        "sample.scale is what a network is told that was trained with guidance.scale drawn",
    ),
    "an interval for a network without": (
        "sample: {interval: [0.4, 0.6]}",
        "sample.interval is what a network is told",
    ),
    "an interval that is built in": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1}\nsample: {interval: [0.4, 0.6]}",
        "sample.interval acts where guidance.interval is drawn",
    ),
    "an interval that falls": (
        "model: {inputs: [scale, interval]}\nguidance: {scale: drawn, interval: drawn, label_dropout: 0.1}\n"
        "sample: {interval: [0.6, 0.4]}",
        "sample.interval must rise within 0 to 1, got [0.6, 0.4]",
    ),
    "a scale below 1 at sampling": (
        "model: {inputs: [scale]}\nguidance: {scale: drawn, label_dropout: 0.1}\nsample: {scale: 0.5}",
        "sample.scale must be 1 or more, got 0.5",
    ),
    "labels of more rows than there are": (
        "times: {equal_share: 0.1}\nguidance: {label_dropout: 0.1, drop: equal}",
        "label_dropout 0.1 must be less than their share 0.1",
    ),
    "whose labels of none": (
        "guidance: {drop: equal}",
        "guidance.drop equal says whose labels are dropped, label_dropout 0 drops none",
    ),
    "the larger of two, and a law of its own": (
        "times: {equal_draw: max, equal: {mean: 0}}",
        "with equal_draw max there is none: choose one",
    ),
    "the larger of a time and a share": (
        "times: {equal_draw: max, order: r_in_t_range}",
        "order r_in_t_range has a time and a share",
    ),
    "a warm-up from zero of no steps": (
        "optim: {warmup_from: zero, warmup_steps: 0}",
        "without warm-up (warmup_steps 0) does nothing",
    ),
    "a velocity head of the Shortcut Model": (
        "alpha: 0.5\nmodel: {velocity_head: 8}\nloss: {velocity: network, weight: none}",
        "model.velocity_head",
    ),
    "averages of every 0 steps": ("ema: {every: 0}", "ema.every must be 1 or more, got 0"),
    "null byte in a name": (
        'data: {store: "a\\0b"}',
        "data.store wants text, got 'a\\x00b': a line break, a null byte",
    ),
    "half a character": ('data: {store: "\\ud83d"}', "half a character cannot stand here"),
    "half-life 0": ("ema: {half_lives: [0]}", "each more than 0 steps"),
    "repeated metric": ("eval: {metrics: [fid, fid]}", "eval.metrics names fid twice"),
    "grid": ("sample: {two_step_times: [1, 0.5, 0.5]}", "must fall from 1 to 0"),
    "times and nfe": ("sample: {nfe: 1, times: [1, 0.5, 0]}", "sample.times has 3 times, nfe 1"),
    "bad name": ("name: ../x", "name '../x' names a folder: write one without / and \\"),
    "the folder above": ('name: ".."', "name '..' names a folder"),
    "alias bomb": (BOMB, "r.yaml:1: anchors and aliases (& and *) are not allowed"),
    "python tag": ("train: !!python/object/apply:os.system [echo]", "tags such as"),
    "merge key": ("train: {<<: {steps: 3}}", "unknown key 'train.<<'"),
    "tab": ("train:\n\tsteps: 3", "r.yaml:2: a tab: YAML indents with spaces"),
    "not yaml": ("train: [3", "not valid YAML"),
    "two documents": ("train: {steps: 3}\n---\ntrain: {steps: 4}", "a second document (---)"),
    "a list": ("- train", "a recipe is a mapping of sections (model:, data:, train: …), this is a list"),
    "empty": ("# nothing\n", "this is empty"),
    "one word": ("b2", "this is one value"),
    "deep": ("[" * 5000, "more than 12 levels"),
    "unfinished grouping": ("train: {steps: 1_}", "train.steps wants a whole number, got '1_'"),
    "double grouping": ("optim: {lr: 1__0}", "optim.lr wants a number, got '1__0'"),
    "grouping before an exponent": ("optim: {lr: 1_e5}", "optim.lr wants a number, got '1_e5'"),
    "4,000 digits": (f"train: {{steps: {'9' * 4000}}}", "more than 1,000,000,000,000"),
    "5,000 digits": (f"train: {{steps: {'9' * 5000}}}", "train.steps has 5,000 characters, and 4,096 is the most"),
    "5,000 digits for a float": (f"optim: {{lr: {'9' * 5000}}}", "optim.lr has 5,000 characters"),
    "a percentage of 400 digits": (f"alpha: {{kind: sigmoid, end: {'9' * 400}%}}", "more than 1,000,000,000,000%"),
    "a long name": (f"name: {'x' * 5000}", "name has 5,000 characters"),
    "too many steps per picture": ("sample: {nfe: 1000000000}", "sample.nfe must be 10,000 or less, got 1000000000"),
    "too many steps in a list": ("eval: {nfe: [1, 20000]}", "each from 1 to 10,000, got [1, 20000]"),
    "too deep a network": ("model: {depth: 1000000000}", "model.depth must be 10,000 or less"),
    "too large a picture": ("data: {image_size: 1000000}", "data.image_size must be 8,192 or less"),
    "a long list": (f"ema: {{half_lives: [{'1, ' * 1001}]}}", "ema.half_lives has 1,001 items, and 1,000 is the most"),
    "very many values": ("a: 1\n" * 6000, "more than 5,000 names and values, so this is not a recipe"),
    "a block of many lines": ("a: |\n" + "  x\n" * 9000, "unknown key 'a'"),
    "velocity head too deep": ("model: {depth: 4, velocity_head: 5}", "velocity_head 5 is more than model.depth 4"),
    "velocity head below 0": ("model: {velocity_head: -1}", "model.velocity_head must be 0 or more, got -1"),
    "interval without scale": ("model: {inputs: [interval]}", "write inputs: [scale, interval]"),
    "an input twice": ("model: {inputs: [scale, scale]}", "model.inputs names scale twice"),
    "an unknown input": ("model: {inputs: [scal]}", "model.inputs[0] wants one of scale, interval; got 'scal'"),
    "scale without labels": (
        "model: {inputs: [scale]}\ndata: {classes: 0}",
        "about guidance, which needs labels, and data.classes is 0",
    ),
    "modern with qk_norm": ("model: {block: modern, qk_norm: true}", "has a norm of queries and keys already"),
    "modern with a table": ("model: {block: modern, positions: fixed}", "the table of positions, and block modern has"),
    "modern with odd heads": ("model: {block: modern, dim: 36, heads: 4}", "gives each head 9 channels"),
    "tokens without tokens": (
        "model: {tokens: {label: 4}}",
        "model.tokens counts the tokens of conditioning: tokens",
    ),
    "no tokens": ("model: {conditioning: tokens, tokens: {time: 0}}", "model.tokens.time must be 1 or more, got 0"),
    "tokens of no input": (
        "model: {conditioning: tokens, tokens: {scale: 2}}",
        "tokens of an input that is not there: model.inputs has no scale",
    ),
    "tokens of no label": (
        "model: {conditioning: tokens, tokens: {label: 2}}\ndata: {classes: 0}",
        "tokens of an input that is not there: data.classes is 0",
    ),
    "tokens and r": ("model: {conditioning: tokens, second_time: r}", "the network is given t - r only"),
    "tokens and noise": ("model: {conditioning: tokens, prediction: noise}", "prediction: noise needs it: use adaln"),
    "a long scalar": (f"data: {{store: {'y' * 60000}}}", "data.store has 60,000 characters"),
    "a long key": (f"? {'k' * 5000}\n: 1", "unknown key 'kkk"),
    "complex key": ("? [a]\n: 3", "a key must be a name"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_the_fault_is_said_with_its_place(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    assert run(["recipe", "show", "r.yaml"]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: r.yaml")
    assert "Traceback" not in err
    assert len(err) < 1000
    assert out == ""


def test_a_schedule_that_is_a_wrong_word_is_one_fault(capsys):
    """It was one of its initial value, and one of its final value, and nobody had written either."""
    for word in ("sigmoid", "nan", "50%", ""):
        assert run(["recipe", "show", "b2", "--set", f"alpha={word}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: --set alpha={word}: alpha wants a number or a schedule, got")


def test_every_fault_is_listed_in_the_order_of_the_lines():
    text = "train:\n  steps: -1\n  btch: 3\noptim:\n  lr: x\n"
    with pytest.raises(AlphaflowError) as caught:
        recipe_from_text(text, "r.yaml", ["ema.ramp=-1"])
    said = str(caught.value).splitlines()
    assert said[0] == "r.yaml has 4 faults:"
    assert [line.split(": ")[0].strip() for line in said[1:]] == [
        "r.yaml:2",
        "r.yaml:3",
        "r.yaml:5",
        "--set ema.ramp=-1",
    ]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps=many", "--set train.steps=many: train.steps wants a whole number"),
        ("train.stps=3", "unknown key 'train.stps'. Did you mean 'steps'?"),
        ("train.steps", "wants the form section.key=value"),
        ("=3", "wants the form section.key=value"),
        ("train..steps=3", "wants the form section.key=value"),
        ("alpha.kind.deeper=3", "alpha.kind wants one of"),
        ("train.steps=*a", "anchors and aliases"),
        ("train.steps=", "train.steps is empty"),
        ("train.steps=200000\x00", "not valid YAML"),
    ],
)
def test_set_is_checked_like_a_line_of_the_file(assignment, message, capsys):
    assert run(["recipe", "show", "b2", "--set", assignment]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_file_that_is_no_recipe_is_named(tmp_path, capsys):
    big, binary, folder = tmp_path / "big.yaml", tmp_path / "binary.yaml", tmp_path / "folder.yaml"
    big.write_bytes(b"#" * 50_000_000)
    binary.write_bytes(bytes(range(256)))
    folder.mkdir()
    said = {
        big: f"larger than {MAX_FILE // 1024} KiB",
        binary: "not UTF-8 text",
        folder: "a directory, not a recipe",
        tmp_path / "missing.yaml": "no such file",
        tmp_path / ("x" * 300 + ".yaml"): "cannot be read",
        binary / "r.yaml": "cannot be read",
    }
    for path, message in said.items():
        assert run(["recipe", "check", str(path)]) == 1
        assert f"{path}: {message}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read from its start")
def test_an_unreadable_file_is_named(capsys):
    assert run(["recipe", "check", "/proc/self/mem"]) == 1
    assert "/proc/self/mem: cannot be read (" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("train: {steps: 3}")
    path.chmod(0)
    assert run(["recipe", "check", str(path)]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_an_unknown_recipe_is_met_with_the_nearest_name():
    with pytest.raises(AlphaflowError, match=r"'xl2-cgf' is neither .* Did you mean 'xl2-cfg'\?"):
        load_recipe("xl2-cgf")


@pytest.mark.parametrize("accepted", ["1e-4", "1E-4", "1.e-4", ".0001", "0.0001", "+1e-4"])
def test_a_float_may_be_written_as_anyone_writes_it(accepted):
    assert recipe_from_text(f"optim: {{lr: {accepted}}}", "r").optim.lr == 1e-4


def test_a_whole_number_is_good_where_a_float_is_due_and_may_be_grouped():
    recipe = recipe_from_text("optim: {lr: 1}\ntrain: {steps: 1_000}", "r")
    assert (recipe.optim.lr, type(recipe.optim.lr), recipe.train.steps) == (1.0, float, 1000)


def test_a_schedule_that_does_not_finish_is_good_when_it_says_so():
    recipe = recipe_from_text("alpha: {kind: sigmoid, end: 800000, unfinished: true}", "r")
    assert recipe.alpha.unfinished


def seconds_of(work):
    before = time.monotonic()
    with pytest.raises(AlphaflowError) as caught:
        work()
    return time.monotonic() - before, str(caught.value)


def test_very_many_faults_are_counted_and_the_first_are_shown():
    text = "".join(f"key{i}: 1\n" for i in range(2000)) + "train: {steps: -1}\n"
    seconds, said = seconds_of(lambda: recipe_from_text(text, "r.yaml"))
    lines = said.splitlines()
    assert lines[0] == "r.yaml has 2,001 faults:"
    assert lines[1].startswith("  r.yaml:1: unknown key 'key0'")
    assert lines[-1] == f"  and {2001 - (len(lines) - 2):,} more"
    assert len(lines) <= 40
    assert len(said) <= 4000
    assert seconds < 1.5  # 0.25 s on an idle machine; looking for likenesses of each took 2.8 s


def test_a_recipe_of_a_hundred_thousand_keys_is_refused_at_once_wherever_it_stands():
    text = "".join(f"key{i}: 1\n" for i in range(100_000))
    seconds, said = seconds_of(lambda: recipe_from_text(text, "model.safetensors (its recipe)"))
    assert said == "model.safetensors (its recipe): larger than 256 KiB, so it is not a recipe"
    assert seconds < 1


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([f"key{i}=1" for i in range(4000)], "4,000 times --set, and 1,000 is the most"),
        ([f"key{i}=1" for i in range(900)], "has 900 faults"),
        (["train." + "s" * 5000 + "=1"], "…(4,"),
        ([".".join("a" * 3000) + "=1"], "more than 12 names inside each other"),
        (["train.steps=" + "[" * 50_000], "more than 12 levels"),
        (["train.steps=" + "9" * 5000], "train.steps has 5,000 characters"),
        (["train.steps=1_", "optim.lr=1_e5", "alpha.end=" + "9" * 400 + "%"], "has 3 faults"),
    ],
)
def test_a_monstrous_set_gets_a_short_answer_at_once(sets, message):
    seconds, said = seconds_of(lambda: load_recipe("b2", sets))
    assert message in said
    assert len(said) <= 4000
    assert len(said.splitlines()) <= 40
    assert seconds < 1.5


def test_numbers_may_be_grouped_as_before():
    recipe = recipe_from_text("train: {steps: 1_000_000}\noptim: {lr: 1_0.5e-4, eps: 1.e-8}", "r")
    assert (recipe.train.steps, recipe.optim.lr, recipe.optim.eps) == (1_000_000, 10.5e-4, 1e-8)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "format: 3\nmodel: {no_such_key: 1}": "r.yaml:1: made by a newer alphaflow (format 3, this one reads up to 1): "
        "update it",
        "name: x\nformat: 0": "r.yaml:2: format wants a plain whole number, such as 1, got '0'",
        'format: "1"': "r.yaml:1: format wants a plain whole number",
        "format: 1e0": "r.yaml:1: format wants a plain whole number",
        "format: [1]": "r.yaml:1: format wants a plain whole number",
        "format: 9999999999999": "r.yaml:1: format wants a plain whole number",
        "format: 1\nmodel: {dimm: 3}": "r.yaml:2: unknown key 'model.dimm'",
    }.items(),
)
def test_a_format_that_cannot_be_read_is_one_line(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    assert run(["recipe", "check", "r.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
