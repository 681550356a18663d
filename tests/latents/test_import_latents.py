"""Latents of other systems: each form is written as its system writes it, and becomes the store that we would make."""

import json
import pickle
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_stores import random_moments
from safetensors.torch import save_file
from tiny_autoencoders import tiny_kl

from alphaflow_cli.cli import run as cli
from alphaflow_cli.data.store import open_store, verify_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.latents.foreign import open_foreign
from alphaflow_cli.latents.importing import ImportRequest, import_latents

COUNT, CLASSES = 40, 5
WITHOUT = pytest.mark.skipif(not find_spec("lmdb"), reason="the form lmdb needs the package lmdb")
LABELS = np.arange(COUNT) * 3 % CLASSES


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "tiny-kl"
    tiny_kl(folder)
    return folder


@pytest.fixture(scope="module")
def moments():
    return random_moments(COUNT, dtype=np.float32)


def write_dit(folder, moments):
    """One (1, C, h, w) and one (1,) file per picture, the latent times 0.18215."""
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for i, row in enumerate(moments):
        np.save(folder / f"imagenet256_features/{i}.npy", row[None, :4] * np.float32(0.18215))
        np.save(folder / f"imagenet256_labels/{i}.npy", LABELS[i : i + 1])


def write_lightningdit(folder, moments):
    folder.mkdir()
    for shard, span in enumerate((slice(0, 25), slice(25, COUNT))):
        mean = torch.from_numpy(moments[span, :4].copy())
        content = {"latents": mean, "latents_flip": mean.flip(-1).contiguous()}
        content["labels"] = torch.from_numpy(LABELS[span].astype(np.int32))
        save_file(content, folder / f"latents_rank00_shard{shard:03d}.safetensors", {"dtype": "torch.float32"})
    stats = {"mean": torch.arange(4.0)[None, :, None, None], "std": torch.ones(1, 4, 1, 1) * 2}
    torch.save(stats, folder / "latents_stats.pt")


def write_repa(folder, moments):
    (folder / "vae-sd" / "00000").mkdir(parents=True)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
    for name, row in zip(names, moments, strict=True):
        np.save(folder / "vae-sd" / name, row)
    labels = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def with_logvar(moments):
    return np.concatenate([moments[:, :4], 2 * np.log(moments[:, 4:])], axis=1).astype(np.float32)


def write_lmdb(folder, moments):
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as writing:
        for i, row in enumerate(with_logvar(moments)):
            entry = {"moments": row, "moments_flip": row[..., ::-1].copy(), "label": int(LABELS[i]), "filename": "a"}
            writing.put(str(i).encode(), pickle.dumps(entry))
        writing.put(b"num_samples", str(COUNT).encode())


def write_moments(folder, moments):
    folder.mkdir()
    content = {"moments": torch.from_numpy(with_logvar(moments)), "label": torch.from_numpy(LABELS)}
    save_file(content, folder / "a.safetensors")


WRITERS = {
    "dit-npy": write_dit,
    "lightningdit": write_lightningdit,
    "repa": write_repa,
    "lmdb": write_lmdb,
    "moments-safetensors": write_moments,
}
FORMS = [pytest.param(form, marks=WITHOUT if form == "lmdb" else ()) for form in WRITERS]
MORE = {"moments-safetensors": "--second logvar"}


def line(source, form, vae, *more):
    known = f"--from {form} --autoencoder {vae} --size 32 --crop adm --classes {CLASSES} {MORE.get(form, '')}"
    return shlex.split(f"import-latents {source} {known} --out {source}-store {' '.join(more)}")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_becomes_the_store_of_the_same_latents(form, vae, moments, tmp_path, capfd):
    source = tmp_path / "theirs"
    WRITERS[form](source, moments)
    assert cli(line(source, form, vae)) == 0, capfd.readouterr().err
    store = open_store(Path(f"{source}-store"), "full")
    plan, kind = store.plan, store.plan.kind
    assert (kind == "moments") == (form not in ("dit-npy", "lightningdit"))
    assert store.labels.tolist() == LABELS.tolist()
    assert (plan.crop, plan.classes, plan.image_size, plan.latent) == ("adm", CLASSES, 32, (4, 4, 4))
    assert plan.flips == (form in ("lightningdit", "lmdb"))
    assert plan.autoencoder.id == "tiny-kl"
    assert len(plan.autoencoder.weights_sha256) == 64
    assert plan.source["form"] == form
    rows = np.concatenate([file.read(kind) for file in store.shards.files])
    np.testing.assert_allclose(rows, moments[:, : rows.shape[1]], rtol=1e-3, atol=1e-3)
    if plan.flips:
        flipped = np.concatenate([file.read(f"{kind}_flip") for file in store.shards.files])
        np.testing.assert_array_equal(flipped, rows[..., ::-1])
    stated = [0.0, 1.0, 2.0, 3.0] if form == "lightningdit" else None
    assert plan.autoencoder.channel_mean == stated
    assert json.loads((tmp_path / "theirs-store" / "classes.json").read_text())["4"] == 4


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_span_are_those_of_the_whole(form, moments, tmp_path):
    WRITERS[form](tmp_path / "theirs", moments)
    foreign = open_foreign(tmp_path / "theirs", form, scale=None, second="logvar" if form in MORE else None)
    whole = foreign.read(0, COUNT)
    for start, stop in ((0, 1), (24, 26), (25, 40), (39, 40)):
        for name, rows in foreign.read(start, stop).items():
            np.testing.assert_array_equal(rows, whole[name][start:stop])


def test_an_import_that_was_cut_short_ends_the_same(vae, moments, tmp_path):
    write_repa(tmp_path / "theirs", moments)
    request = ImportRequest(tmp_path / "theirs", "repa", tmp_path / "whole", str(vae), 32, "adm", CLASSES)
    import_latents(request, shown=False)
    import_latents(ImportRequest(**{**vars(request), "out": tmp_path / "cut"}), shown=False)
    for lost in (("manifest.json", "stats.safetensors", "train-00000.json"), ("plan.json",), ("classes.json",)):
        for name in lost:
            (tmp_path / "cut" / name).unlink()
        with pytest.raises(AlphaflowError, match=r"the same (prep-latents or )?import-latents command again"):
            open_store(tmp_path / "cut", "full")
        import_latents(ImportRequest(**{**vars(request), "out": tmp_path / "cut"}), shown=False)
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert verify_store(tmp_path / "cut") == []


def test_an_imported_store_trains_samples_and_is_measured(vae, moments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_lightningdit(tmp_path / "theirs", moments)
    assert cli(line("theirs", "lightningdit", vae)) == 0
    small = "--set model.dim=16 --set model.depth=1 --set model.heads=2 --set train.steps=2 --set train.batch=4"
    for words in (
        f"recipe new theirs-store -o mine.yaml --set data.autoencoder={vae}",
        f"train mine.yaml {small}",
        "eval runs/mine --reference glyphs:100 --metrics fd-tiny --images 100 --nfe 1",
    ):
        assert cli(shlex.split(words)) == 0, capfd.readouterr().err
    assert "by the mean and std per channel that the autoencoder states" in Path("mine.yaml").read_text()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@WITHOUT
def test_a_pickle_of_an_lmdb_that_would_run_code_is_refused(vae, moments, tmp_path, capfd):
    import lmdb

    write_lmdb(tmp_path / "theirs", moments)
    with lmdb.open(str(tmp_path / "theirs"), map_size=1 << 24) as env, env.begin(write=True) as writing:
        writing.put(b"7", pickle.dumps({"moments": Touch(tmp_path / "executed")}))
    assert cli(line(tmp_path / "theirs", "lmdb", vae)) == 1
    assert "entry 7: cannot be read (it wants to import" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_objects_in_npy_and_stats_are_never_unpickled(vae, moments, tmp_path, capfd):
    write_repa(tmp_path / "theirs", moments)
    np.save(
        tmp_path / "theirs/vae-sd/00000/img-mean-std-00000007.npy", np.array([Touch(tmp_path / "x")]), allow_pickle=True
    )
    assert cli(line(tmp_path / "theirs", "repa", vae)) == 1
    assert "img-mean-std-00000007.npy: cannot be read as .npy" in capfd.readouterr().err
    write_lightningdit(tmp_path / "others", moments)
    torch.save({"mean": Touch(tmp_path / "x")}, tmp_path / "others/latents_stats.pt")
    assert cli(line(tmp_path / "others", "lightningdit", vae)) == 1
    assert "latents_stats.pt: is no table of the tensors mean and std" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def shard(folder, name, flips=True, side=4, count=2, **tensors):
    """A shard of latents in the place of another one, with these tensors."""
    rows = torch.zeros(count, 4, side, side)
    content = {
        "latents": rows,
        "latents_flip": rows.clone(),
        "labels": torch.zeros(count, dtype=torch.int64),
        **tensors,
    }
    if not flips:
        content.pop("latents_flip")
    save_file({key: value for key, value in content.items() if value is not None}, folder / name)


FIRST, LAST = "latents_rank00_shard000.safetensors", "z.safetensors"
ONE, LIST = "vae-sd/00000/img-mean-std-00000009.npy", "vae-sd/dataset.json"
LATENT, LABEL = "imagenet256_features/3.npy", "imagenet256_labels/3.npy"
NAN = np.full((1, 4, 4, 4), np.nan)
OTHER = "differ in shape, or in mirror images, from those of latents_rank00"
BROKEN = {  # form, what is done to the source, and the words of the line
    "another shape": ("repa", lambda f: np.save(f / ONE, np.zeros((8, 2, 2))), "(8, 2, 2), the others have (8, 4, 4)"),
    "a cut file": ("repa", lambda f: cut(f / ONE), "cannot be read as .npy"),
    "a missing file": ("repa", lambda f: (f / ONE).unlink(), "cannot be read as .npy"),
    "no labels": ("repa", lambda f: (f / LIST).write_text('{"labels": null}'), "holds no labels"),
    "words": ("repa", lambda f: (f / LIST).write_text('{"labels": [["a", "b"]]}'), "should be [[name, number], …]"),
    "outside": ("repa", lambda f: (f / LIST).write_text('{"labels": [["../a", 1]]}'), "leads out of the folder"),
    "no list": ("repa", lambda f: (f / LIST).unlink(), "repa wants a dataset.json"),
    "one folder": ("dit-npy", lambda f: (f / "imagenet256_labels").rename(f / "x"), "one *_labels"),
    "no label": ("dit-npy", lambda f: (f / LABEL).unlink(), "imagenet256_labels/3.npy: cannot be read as .npy"),
    "two labels": ("dit-npy", lambda f: np.save(f / LABEL, np.array([1, 2])), "the shape (2,), the others have (1,)"),
    "half a label": ("dit-npy", lambda f: np.save(f / LABEL, np.array([1.5])), "should be one whole number"),
    "lost latents": ("dit-npy", lambda f: (f / LATENT).unlink(), "3.npy is in imagenet256_labels and not in"),
    "not finite": ("dit-npy", lambda f: np.save(f / LATENT, NAN), "'3.npy': its latent is not finite in float16"),
    "out of range": (
        "lightningdit",
        lambda f: shard(f, LAST, labels=torch.tensor([0, 7])),
        "label 7, out of range",
    ),
    "negative": ("lightningdit", lambda f: shard(f, FIRST, labels=torch.tensor([0, -1])), "should be one whole number"),
    "one label for all": ("lightningdit", lambda f: shard(f, FIRST, labels=torch.tensor(3)), "do not go together"),
    "no rows": ("lightningdit", lambda f: [shard(f, x.name, count=0) for x in f.glob("*.saf*")], "holds no latents"),
    "beyond": (
        "lightningdit",
        lambda f: shard(f, FIRST, labels=torch.tensor([0, -1]).view(torch.uint64)),
        "should be one whole number",
    ),
    "fewer labels": ("lightningdit", lambda f: shard(f, FIRST, labels=torch.tensor([0])), "do not go together"),
    "no latents": ("lightningdit", lambda f: shard(f, FIRST, latents=None), "latents and labels are wanted"),
    "another side": ("lightningdit", lambda f: shard(f, LAST, side=2), OTHER),
    "no mirror images": ("lightningdit", lambda f: shard(f, LAST, flips=False), OTHER),
    "a cut shard": ("lightningdit", lambda f: cut(f / FIRST), "cannot be read as safetensors"),
    "no shard": ("lightningdit", lambda f: [x.unlink() for x in f.glob("*.safetensors")], "holds no *.safetensors"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_source_is_one_line(fault, vae, moments, tmp_path, capfd):
    form, harm, words = BROKEN[fault]
    WRITERS[form](tmp_path / "theirs", moments)
    harm(tmp_path / "theirs")
    assert cli(line(tmp_path / "theirs", form, vae)) == 1
    error = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(error) == 1
    assert words in error[0]


SAYS = {  # a change of the command line, and the words of the line
    ("--from repa", ""): "does not say which system wrote them: dit-npy|lightningdit|repa|lmdb|moments-safetensors",
    ("--autoencoder VAE", ""): "does not say which autoencoder made the latents",
    ("--size 32", ""): "does not say the side of the pictures that were encoded, in px. Give --size",
    ("--crop adm", ""): "does not say how pictures became square: adm",
    ("--classes 5", ""): "does not say how many classes there are (1000 for ImageNet). Give --classes",
    ("--from repa", "--from webdataset"): "--from webdataset: not read (tars of latents are written in several ways",
    ("--from repa", "--from edm2"): "--from edm2: not read",
    ("--from repa", "--from paper"): "--from paper: not known. Known are dit-npy, lightningdit, repa, lmdb",
    ("--from repa", "--from lightningdit"): "holds no *.safetensors. Is it of another form?",
    ("--size 32", "--size 64"): "are of pictures of 32 px. Give --size 32, or the right autoencoder",
    ("--crop adm", "--crop adm --scale 2"): "the latents of repa are not scaled. Leave --scale out",
    ("--crop adm", "--crop adm --second std"): "repa says itself what its second half is",
    ("theirs ", "nowhere "): "nowhere: no such folder or file",
    ("theirs ", "VAE/config.json "): "no folder. Latents of the form repa lie in one: unpack an archive",
}  # fmt: skip


@pytest.mark.parametrize("change", SAYS)
def test_what_the_source_does_not_say_is_wanted_by_its_option(change, vae, moments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_repa(tmp_path / "theirs", moments)
    text = "import-latents theirs --from repa --autoencoder VAE --size 32 --crop adm --classes 5 --out store"
    assert cli(shlex.split(text.replace(*change).replace("VAE", str(vae)))) == 1
    error = [each for each in capfd.readouterr().err.splitlines() if each.startswith("error: ")]
    assert len(error) == 1
    assert SAYS[change] in error[0]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("form", "why"), [("webdataset", "not read (tars of latents"), ("paper", "not known. Known are dit-npy")]
)
def test_a_form_that_is_not_read_is_said_before_its_other_facts_are_wanted(form, why, tmp_path, capfd):
    assert cli(["import-latents", str(tmp_path), "--from", form]) == 1
    assert capfd.readouterr().err.startswith(f"error: --from {form}: {why}")


def test_moments_that_do_not_say_their_second_half_are_not_guessed(vae, moments, tmp_path, capfd):
    write_moments(tmp_path / "theirs", moments)
    words = [
        word for word in line(tmp_path / "theirs", "moments-safetensors", vae) if word not in ("--second", "logvar")
    ]
    assert cli(words) == 1
    assert "does not say what follows the mean: give --second std, or --second logvar" in capfd.readouterr().err
    assert cli([*words, "--second", "std"]) == 1
    assert "a std below 0; is the second half the log-variance (--second logvar)?" in capfd.readouterr().err


def test_latents_of_other_channels_than_the_autoencoders_are_refused(vae, tmp_path, capfd):
    write_moments(tmp_path / "theirs", random_moments(COUNT, channels=4)[:, [0, 1, 4, 5]].astype(np.float32))
    assert cli(line(tmp_path / "theirs", "moments-safetensors", vae)) == 1
    assert "latents of 2 channels, and tiny-kl makes 4" in capfd.readouterr().err


def test_a_name_alone_is_recorded_where_the_autoencoder_is_not_loaded(moments, tmp_path):
    write_repa(tmp_path / "theirs", moments)
    assert cli(line(tmp_path / "theirs", "repa", "hustvl/vavae", "--downscale", "8")) == 0
    record = open_store(tmp_path / "theirs-store", "full").plan.autoencoder
    assert (record.id, record.weights_sha256, record.downscale) == ("hustvl/vavae", "", 8)


def test_what_lmdb_lacks_here_is_named(vae, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("alphaflow_cli.latents.foreign.find_spec", lambda name: None)
    assert cli(line(tmp_path, "lmdb", vae)) == 1
    assert "--from lmdb needs the package lmdb, which is not here: pip install lmdb" in capfd.readouterr().err
