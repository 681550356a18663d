"""Reference statistics: our file, the files of other systems, and what is refused."""

import io
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import ruler
import torch

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.evaluate import Ruler, default_metrics, find_reference, make_reference
from alphaflow_cli.evaluate.pictures import open_pictures
from alphaflow_cli.evaluate.reference import (
    HALF_PIXEL,
    TF1,
    TF1_DINO,
    Reference,
    check_fit,
    floor_of,
    load_reference,
    read_foreign,
    save_reference,
)
from alphaflow_cli.evaluate.tiny import Tiny
from alphaflow_cli.runtime.processes import Processes

FEATURES = np.random.RandomState(0).randn(300, 2048).astype(np.float64)
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)


def build(folder: Path, source: str, *, size: int | None = None, kept: int = 10_000) -> Reference:
    ruler_ = Ruler({"tiny": Tiny()}, Processes(torch.device("cpu")), folder / "work", batch=64)
    made = make_reference(
        open_pictures(source, size=size, limit=None), ruler_, folder / "r.safetensors", name="", kept=kept
    )
    assert made is not None
    return made[0]


def test_our_file_gives_back_what_was_measured_with_its_protocol(tmp_path: Path) -> None:
    images = ruler.pictures(150)
    folder = ruler.write_pictures(tmp_path / "real", images)
    reference = build(tmp_path, str(folder), kept=100)
    features = Tiny()(images).double().numpy()
    stats = reference.stats["tiny"]
    np.testing.assert_allclose(stats.mean, features.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats.cov, np.cov(features, rowvar=False), atol=1e-10)
    assert stats.features is not None
    assert stats.features.shape == (100, 192)
    assert stats.space.network == "fd_haar192"
    for key, value in {"name": "real", "kind": "folder", "count": 150, "size": [32, 32]}.items():
        assert reference.facts[key] == value
    assert len(reference.facts["sha256"]) == len(reference.facts["pictures_sha256"]) == 64


def test_the_pictures_hash_does_not_depend_on_the_container(tmp_path: Path) -> None:
    images = ruler.pictures(120)
    np.savez(tmp_path / "same.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    one = build(tmp_path / "a", str(ruler.write_pictures(tmp_path / "real", images)))
    two = build(tmp_path / "b", str(tmp_path / "same.npz"))
    assert one.facts["pictures_sha256"] == two.facts["pictures_sha256"]
    assert one.facts["sha256"] != two.facts["sha256"]


def test_a_reference_built_again_has_the_same_hash_and_another_mean_another(tmp_path: Path) -> None:
    real = ruler.write_pictures(tmp_path / "real", ruler.pictures(120))
    hashes = {
        build(tmp_path / str(i), str(real)).facts["sha256"] for i in range(8)
    }  # bytes of a header come in any order
    assert len(hashes) == 1
    reference = build(tmp_path / "again", str(real))
    reference.stats["tiny"].mean[0] += 1e-9
    save_reference(reference, tmp_path / "moved.safetensors")
    assert load_reference(tmp_path / "moved.safetensors").facts["sha256"] not in hashes


def test_files_of_the_home_folder_may_be_named_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "real.npz", arr_0=ruler.pictures(100).permute(0, 2, 3, 1).numpy())
    built = build(tmp_path, "~/real.npz")
    found = find_reference("~/r.safetensors", (32, 32), None)  # as a recipe's eval.reference may be written
    assert found.facts["sha256"] == built.facts["sha256"]
    assert default_metrics("~/r.safetensors") == ("fd-tiny",)


def test_adm_edm_and_meanflow_npz_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=MU, sigma=SIGMA, mu_s=MU[:3], sigma_s=SIGMA[:3, :3])
    np.savez(tmp_path / "edm.npz", mu=MU, sigma=SIGMA)
    np.savez(tmp_path / "jax.npz", ref_mu=MU, ref_sigma=SIGMA)
    read = [read_foreign(tmp_path / name) for name in ("adm.npz", "edm.npz", "jax.npz")]
    assert [each.facts["kind"] for each in read] == ["ADM npz", "npz of mu, sigma (ADM, EDM)", "MeanFlow npz"]
    adm, edm, jax = (each.stats["inception"] for each in read)
    assert adm.space.preprocessing == edm.space.preprocessing == TF1
    assert jax.space.preprocessing == HALF_PIXEL != TF1
    for each in (adm, edm, jax):
        np.testing.assert_array_equal(each.mean, MU)
        np.testing.assert_array_equal(each.cov, SIGMA)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_edm2_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    held = {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU[:1024], "sigma": SIGMA[:1024, :1024]}}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({**held, "num_images": 1_281_167}, protocol=protocol))
    found = read_foreign(tmp_path / "edm2.pkl")
    assert (list(found.stats), found.facts["count"]) == (["inception", "dinov2"], 1_281_167)
    np.testing.assert_array_equal(found.stats["dinov2"].cov, SIGMA[:1024, :1024])


def test_alphaflow_pickles_of_sums_become_a_covariance_over_n_minus_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("dnnlib.util")
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    module.EasyDict = easy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
    monkeypatch.setitem(sys.modules, "dnnlib.util", module)
    sums = easy(raw_mean=FEATURES.sum(0), raw_cov=FEATURES.T @ FEATURES, num_items=300, num_features=2048)
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(sums))
    monkeypatch.undo()
    found = read_foreign(tmp_path / "stats.pkl")
    assert found.facts["count"] == 300
    np.testing.assert_allclose(found.stats["inception"].mean, MU, atol=1e-14)
    np.testing.assert_allclose(found.stats["inception"].cov, SIGMA, atol=1e-12)


def test_torch_fidelitys_cache_is_read_and_its_dinov2_is_not_taken_for_fdd(tmp_path: Path) -> None:
    name = "cifar10-train-inception-v3-compat-stat-fid-2048.pt"
    torch.save({"mu": MU.astype(np.float32), "sigma": SIGMA}, tmp_path / name)
    torch.save({"mu": MU[:1024], "sigma": SIGMA[:1024, :1024]}, tmp_path / "x-dinov2-vit-l-14-stat-fid-dinov2.pt")
    found = read_foreign(tmp_path / name).stats["inception"]
    np.testing.assert_allclose(found.mean, MU, atol=1e-7)
    assert found.space.preprocessing == TF1
    other = read_foreign(tmp_path / "x-dinov2-vit-l-14-stat-fid-dinov2.pt").stats["dinov2"]
    assert other.space.preprocessing == TF1_DINO


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".npz"])
def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    path, target = tmp_path / f"evil{suffix}", tmp_path / "ran"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"fid": Evil(target)}))
    elif suffix == ".pt":
        torch.save({"mu": Evil(target)}, path)
    else:
        np.savez(path, mu=np.array([Evil(target)], dtype=object), sigma=np.zeros((1, 1)))
    with pytest.raises(AlphaflowError, match="cannot be read as reference statistics"):
        load_reference(path)
    assert not target.exists()


def test_files_that_are_no_reference_say_what_they_hold(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=MU)
    with pytest.raises(AlphaflowError, match="it holds weights"):
        load_reference(tmp_path / "other.npz")
    np.savez(tmp_path / "misfit.npz", mu=MU, sigma=SIGMA[:5, :5])
    with pytest.raises(AlphaflowError, match="does not fit"):
        load_reference(tmp_path / "misfit.npz")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"fid": {"mu": MU}})[:-40])
    with pytest.raises(AlphaflowError, match=r"cut\.pkl"):
        load_reference(tmp_path / "cut.pkl")
    with pytest.raises(AlphaflowError, match="alphaflow reference SOURCE"):
        load_reference(tmp_path / "none.npz")
    stream = io.BytesIO()
    torch.save({}, stream)
    (tmp_path / "r.safetensors").write_bytes(stream.getvalue())
    with pytest.raises(AlphaflowError, match="not a whole safetensors file"):
        load_reference(tmp_path / "r.safetensors")


def test_another_resolution_is_refused_with_both_sides(tmp_path: Path) -> None:
    reference = build(tmp_path, str(ruler.write_pictures(tmp_path / "real", ruler.pictures(120, size=48))), size=32)
    assert reference.facts["prepared"] == "centre crop, Lanczos to 32 px"
    assert check_fit(reference, "tiny", Tiny(), (32, 32)) == []
    with pytest.raises(AlphaflowError, match=r"reference: 32×32 px\n  here:      64×64 px"):
        check_fit(reference, "tiny", Tiny(), (64, 64))


def test_another_preprocessing_or_network_is_refused_with_both_sides(tmp_path: Path) -> None:
    reference, other = build(tmp_path, str(ruler.write_pictures(tmp_path / "real", ruler.pictures(120)))), Tiny()
    other.preprocessing = "half-pixel bilinear"
    with pytest.raises(
        AlphaflowError, match=r"(?s)preprocessing differ.*reference: larger.*here: +half-pixel bilinear"
    ):
        check_fit(reference, "tiny", other, (32, 32))
    with pytest.raises(AlphaflowError, match=r"no statistics of the inception features \(it has tiny\)"):
        check_fit(reference, "inception", other, (32, 32))


def test_what_a_foreign_file_leaves_unsaid_is_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=MU, sigma=SIGMA, mu_s=MU[:3])
    stand_in = Tiny()
    stand_in.id, stand_in.dim, stand_in.preprocessing, stand_in.weights_sha256 = "inception", 2048, TF1, "6726825d"
    assert check_fit(load_reference(tmp_path / "adm.npz"), "inception", stand_in, (256, 256)) == [
        "weights sha256",
        "resolution",
    ]


def test_the_floor_is_the_distance_of_fresh_real_pictures(tmp_path: Path) -> None:
    real, fresh = ruler.pictures(1200, seed=1), ruler.pictures(400, seed=2)
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    reference = build(tmp_path, str(tmp_path / "real.npz"))
    from alphaflow_cli.core.frechet import Moments, frechet_distance

    moments = Moments(192)
    moments.update(Tiny()(fresh))
    stats = reference.stats["tiny"]
    measured = frechet_distance(*moments.finalise(), stats.mean, stats.cov)
    floor = floor_of(reference, "tiny", 400)
    assert floor is not None
    assert measured / floor == pytest.approx(1, abs=0.15)


def test_the_header_is_plain_json(tmp_path: Path) -> None:
    from safetensors import safe_open

    build(tmp_path, str(ruler.write_pictures(tmp_path / "real", ruler.pictures(120))))
    with safe_open(str(tmp_path / "r.safetensors"), "pt") as file:
        header = file.metadata()
    assert header["format"] == "alphaflow-reference/1"
    assert json.loads(header["spaces"])["tiny"]["dim"] == 192
    assert json.loads(header["facts"])["source"]["name"] == "real"


def test_a_kept_reference_that_is_damaged_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = str(ruler.write_pictures(tmp_path / "real", ruler.pictures(120)))
    ruler_ = Ruler({"tiny": Tiny()}, Processes(torch.device("cpu")), tmp_path / "work", batch=64)
    digest = find_reference(real, (32, 32), ruler_).facts["sha256"]
    (kept,) = (tmp_path / "work").glob("reference-*.safetensors")
    whole = kept.read_bytes()
    for damaged in (whole[:-100], whole.replace(b"alphaflow-reference/1", b"alphaflow-reference/0"), b""):
        kept.write_bytes(damaged)
        assert find_reference(real, (32, 32), ruler_).facts["sha256"] == digest
        assert f"{kept.name} is damaged, so it is measured again" in capsys.readouterr().err
    assert find_reference(real, (32, 32), ruler_).facts["sha256"] == digest
    assert "damaged" not in capsys.readouterr().err
