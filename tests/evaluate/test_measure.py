"""The pass over the pictures: equality with torch-fidelity's own, chunks, resume, ranks, and broken input."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ruler
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate import measure, score
from alphaflow_cli.evaluate.evaluate import Ruler, evaluate, make_reference
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.measure import Clock, Pass, content_of, gather_moments, load_all, run_pass
from alphaflow_cli.evaluate.networks import BUILDERS, build_extractor
from alphaflow_cli.evaluate.pictures import ImageSource
from alphaflow_cli.evaluate.reference import Reference, Stats
from alphaflow_cli.evaluate.results import space_of
from alphaflow_cli.evaluate.score import Measured
from alphaflow_cli.evaluate.tiny import Tiny
from alphaflow_cli.runtime.processes import Processes

CPU = torch.device("cpu")


class Held(ImageSource):
    """Pictures in memory; counts what was asked for."""

    def __init__(self, images: Tensor, name: str = "held") -> None:
        self.seconds: dict[str, float] = {}
        self.held, self.label, self.asked = images, name, list[tuple[int, int]]()
        self.count, self.size = len(images), (int(images.shape[2]), int(images.shape[3]))

    def images(self, start: int, stop: int) -> Tensor:
        self.asked.append((start, stop))
        return self.held[start:stop]

    def describe(self) -> dict[str, Any]:
        return {"kind": "memory", "name": self.label, "count": self.count, "prepared": "as they are"}

    def fingerprint(self) -> str:
        return self.label


def finished(folder: Path, images: Tensor, extractors: dict[str, Extractor], *, chunk: int = 250) -> Pass:
    work = Pass(Held(images), extractors, folder, chunk)
    run_pass(work, Processes(CPU), batch=16, clock=Clock())
    return work


class Pictures(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def both_rulers(
    folder: Path, fake: Tensor, real: Tensor, monkeypatch: pytest.MonkeyPatch, network: str = "inception-v3-compat"
) -> tuple[dict, dict]:
    """Torch-fidelity's `calculate_metrics` and ours, with one random Inception in the hub cache, or a small network."""
    from torch_fidelity import calculate_metrics

    if network == "small":
        monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "small", ruler.TheirSmall)
        monkeypatch.setitem(BUILDERS, "inception", ruler.Small)
    else:
        ruler.random_inception(folder / "hub" / "checkpoints" / ruler.INCEPTION_FILE)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    size, splits = min(len(fake), len(real), 100), 2 if len(fake) < 100 else 10
    theirs = calculate_metrics(
        input1=Pictures(fake), input2=Pictures(real), isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=size, isc_splits=splits, feature_extractor=network,
        cuda=False, verbose=False, save_cpu_ram=True, batch_size=16,
    )  # fmt: skip
    extractors = {"inception": build_extractor("inception", device=CPU, weights=None)}
    works = {name: finished(folder / name, images, extractors) for name, images in (("f", fake), ("r", real))}
    mean, cov = gather_moments(works["r"], Processes(CPU))["inception"].finalise()
    stats = Stats(space_of(extractors["inception"]), mean, cov, load_all(works["r"], "inception"))
    reference = Reference({"inception": stats}, {"name": "r", "kind": "memory", "size": None, "sha256": "0" * 64})
    monkeypatch.setattr(score, "KID_SIZE", size)
    monkeypatch.setattr(score, "IS_SPLITS", splits)
    measured = Measured(works["f"], gather_moments(works["f"], Processes(CPU)), reference, CPU)
    rows = score.score(measured, ("fid", "kid", "is", "pr"))
    return theirs, {row.name.split("(")[0].split("-")[0]: row for row in rows}


def check_both(theirs: dict, ours: dict, *, rel: float) -> None:
    fd = ours["FID" if "FID" in ours else "FD"]  # random weights: not to be called FID
    assert fd.value == pytest.approx(theirs["frechet_inception_distance"], rel=rel)
    assert ours["KID"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6)
    assert ours["KID"].spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-2, abs=1e-6)
    assert ours["IS"].value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["IS"].spread == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    assert ours["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)


def test_all_metrics_of_a_small_network_equal_torch_fidelitys_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, real = ruler.pictures(210, contrast=0.9), ruler.pictures(190, seed=1, contrast=1.1)
    check_both(*both_rulers(tmp_path, fake, real, monkeypatch, "small"), rel=1e-5)


def test_the_settings_of_published_scores_are_torch_fidelitys() -> None:
    """The tests above set the smaller of these for small sets."""
    ours = score.KID_SUBSETS, score.KID_SIZE, score.IS_SPLITS, score.NEIGHBOURS, score.DRAW_SEED
    names = "kid_subsets", "kid_subset_size", "isc_splits", "prc_neighborhood", "rng_seed"
    assert ours == tuple(DEFAULTS[name] for name in names) == (100, 1000, 10, 3, 2020)


@pytest.mark.slow  # half a minute for two roots of 2,048 dimensions; test_features.py has the network itself
@pytest.mark.timeout(900)
def test_fid_kid_is_and_precision_recall_equal_torch_fidelitys_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = both_rulers(
        tmp_path, ruler.pictures(12, contrast=0.9), ruler.pictures(11, seed=1, contrast=1.1), monkeypatch
    )
    check_both(theirs, ours, rel=1e-4)  # fewer pictures than dimensions: theirs loses digits there
    assert ours["FD"].name.startswith("FD(weights ")  # random weights: not to be called FID


@pytest.mark.slow
@pytest.mark.skipif(not ruler.CIFAR.is_file(), reason="the CIFAR-10 copy is not here")
@pytest.mark.timeout(1800)
def test_on_cifar10_all_four_equal_torch_fidelitys_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both_rulers(tmp_path, ruler.cifar(200, split="test"), ruler.cifar(200, split="train"), monkeypatch)
    for name, row in ours.items():
        print(name, row.value, row.spread)
    print(theirs)
    check_both(theirs, ours, rel=1e-4)


# --- chunks, resume, ranks ---


def moments_of(work: Pass) -> Tensor:
    return gather_moments(work, Processes(CPU))["tiny"].sums


def test_a_second_run_reads_no_picture_and_a_missing_chunk_is_the_only_one_made_again(tmp_path: Path) -> None:
    images = ruler.pictures(110)
    first = finished(tmp_path, images, {"tiny": Tiny()}, chunk=25)
    before = moments_of(first)
    again = finished(tmp_path, images, {"tiny": Tiny()}, chunk=25)
    assert isinstance(again.source, Held)
    assert again.source.asked == []
    first.path(50, 75).unlink()
    third = finished(tmp_path, images, {"tiny": Tiny()}, chunk=25)
    assert isinstance(third.source, Held)
    assert third.source.asked == [(50, 75)]
    assert torch.equal(moments_of(third), before)


def test_a_cut_chunk_is_measured_again_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ruler.pictures(60)
    work = finished(tmp_path, images, {"tiny": Tiny()}, chunk=20)
    before, path = moments_of(work), work.path(20, 40)
    path.write_bytes(path.read_bytes()[:-100])
    again = finished(tmp_path, images, {"tiny": Tiny()}, chunk=20)
    assert isinstance(again.source, Held)
    assert again.source.asked == [(20, 40)]
    assert "is not complete, so it is measured again" in capsys.readouterr().err
    assert torch.equal(moments_of(again), before)


def test_an_interruption_keeps_the_finished_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Held):
        def images(self, start: int, stop: int) -> Tensor:
            if start == 40:
                raise KeyboardInterrupt
            return super().images(start, stop)

    images = ruler.pictures(60)
    work = Pass(Stopped(images), {"tiny": Tiny()}, tmp_path, 20)
    with pytest.raises(KeyboardInterrupt):
        run_pass(work, Processes(CPU), batch=8, clock=Clock())
    assert "run the same command again" in capsys.readouterr().err
    again = finished(tmp_path, images, {"tiny": Tiny()}, chunk=20)
    assert isinstance(again.source, Held)
    assert again.source.asked == [(40, 60)]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_chunks_and_their_moments_add_up(tmp_path: Path, world: int) -> None:
    images = ruler.pictures(110)
    whole = finished(tmp_path / "whole", images, {"tiny": Tiny()}, chunk=25)
    shared = tmp_path / "shared"
    seen, sums = [], torch.zeros(193, 193, dtype=torch.float64)
    for rank in range(world):
        work = Pass(Held(images), {"tiny": Tiny()}, shared, 25)
        run_pass(work, Processes(CPU, rank=rank, size=world), batch=16, clock=Clock())
        assert isinstance(work.source, Held)
        assert work.source.asked == work.chunks()[rank::world]
        seen += work.source.asked
    assert sorted(seen) == whole.chunks()  # each once, also with more ranks than chunks
    for rank in range(world):
        part = measure.Moments(192)
        for chunk in work.chunks()[rank::world]:
            part.update(measure.load_part(work, "tiny", *chunk))
        sums += part.sums
    torch.testing.assert_close(sums, moments_of(whole), rtol=1e-13, atol=1e-10)


def test_features_do_not_depend_on_batch_or_chunk(tmp_path: Path) -> None:
    images = ruler.pictures(90)
    one = load_all(finished(tmp_path / "a", images, {"tiny": Tiny()}, chunk=90), "tiny")
    many = load_all(finished(tmp_path / "b", images, {"tiny": Tiny()}, chunk=7), "tiny")
    assert torch.equal(one, many)


def test_other_pictures_weights_or_chunks_get_another_folder() -> None:
    images, tiny, changed = ruler.pictures(5), Tiny(), Tiny()
    changed.preprocessing = "another"
    ids = [
        measure.evaluation_id(Held(images), {"tiny": tiny}, 250, CPU),
        measure.evaluation_id(Held(images, "other"), {"tiny": tiny}, 250, CPU),
        measure.evaluation_id(Held(images), {"tiny": changed}, 250, CPU),
        measure.evaluation_id(Held(images), {"tiny": tiny}, 100, CPU),
    ]
    assert len(set(ids)) == 4
    assert ids[0] == measure.evaluation_id(Held(images), {"tiny": Tiny()}, 250, CPU)


def test_another_kind_of_device_begins_anew_and_a_cpu_goes_on_with_what_it_has() -> None:
    """Each kind rounds otherwise: a pass that was half measured on a GPU would be neither's."""
    of = partial(measure.evaluation_id, Held(ruler.pictures(5)), {"tiny": Tiny()}, 250)
    assert of(CPU) == "2c60ab83dd1e7565"  # as before devices were named
    assert len({of(torch.device(kind)) for kind in ("cpu", "cuda", "mps")}) == 3
    assert of(torch.device("cuda", 0)) == of(torch.device("cuda", 1))


def test_copies_are_counted_and_the_content_has_one_hash(tmp_path: Path) -> None:
    images = ruler.pictures(30)
    twice = torch.cat([images, images[:7]])
    digest, copies = content_of(finished(tmp_path / "a", twice, {"tiny": Tiny()}, chunk=10))
    assert copies == 7
    assert digest == content_of(finished(tmp_path / "b", twice, {"tiny": Tiny()}, chunk=37))[0]
    assert digest != content_of(finished(tmp_path / "c", twice.flip(0), {"tiny": Tiny()}))[0]


def test_features_that_are_not_finite_stop_the_pass(tmp_path: Path) -> None:
    class Broken(Tiny):
        def features(self, images: Tensor) -> Tensor:
            return super().features(images) * torch.nan

    with pytest.raises(AlphaflowError, match="not finite"):
        finished(tmp_path, ruler.pictures(30), {"tiny": Broken()})
    assert list(tmp_path.glob("*.safetensors")) == []


# --- from pictures to rows ---


def measure_tiny(folder: Path, fake: Tensor, real: Tensor) -> tuple[float, tuple[str, ...], Any]:
    ruler_ = Ruler({"tiny": Tiny()}, Processes(CPU), folder, batch=64)
    made = make_reference(Held(real, "real"), ruler_, folder / "r.safetensors", name="", kept=10_000)
    assert made is not None
    found = evaluate(Held(fake, "fake"), ("fd-tiny",), ruler_, reference=made[0])
    assert found is not None
    return found.rows[0].value, found.rows[0].notes, found


def test_fd_tiny_is_the_distance_of_the_features(tmp_path: Path) -> None:
    from scipy.linalg import sqrtm

    fake, real = ruler.pictures(400, contrast=0.8), ruler.pictures(500, seed=1)
    value, notes, found = measure_tiny(tmp_path, fake, real)
    a, b = (Tiny()(each).double().numpy() for each in (fake, real))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.trace(sqrtm(cov_a @ cov_b).real)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert value == pytest.approx(expected, rel=1e-6)
    assert found.rows[0].name == "FD-tiny-400"
    assert any("biased upwards" in note for note in notes)
    assert not any("singular" in note for note in notes)


def test_fewer_pictures_than_features_give_a_value_and_say_so(tmp_path: Path) -> None:
    value, notes, _ = measure_tiny(tmp_path, ruler.pictures(120), ruler.pictures(500, seed=1))
    assert value > 0
    assert any("covariance is singular: 120 pictures for 192 features" in note for note in notes)


def test_weights_that_are_not_the_published_ones_are_warned_of_whatever_is_measured_first(tmp_path: Path) -> None:
    small = ruler.Small(None).requires_grad_(False)
    small.known, small.weights_sha256 = False, "ab" * 32
    which = Ruler({"inception": small, "tiny": Tiny()}, Processes(CPU), tmp_path, 64)
    made = make_reference(Held(ruler.pictures(100, seed=1), "real"), which, tmp_path / "real.safetensors", name="")
    assert made is not None
    found = evaluate(Held(ruler.pictures(100)), ("fd-tiny", "fid"), which, reference=made[0])
    assert found is not None
    assert [warning.partition(" (")[0] for warning in found.warnings] == ["weights are not the published ones"]


def test_worse_pictures_score_worse(tmp_path: Path) -> None:
    real, draw = ruler.pictures(600, seed=1), torch.Generator().manual_seed(3)
    same = ruler.pictures(300, seed=2)
    noisy = (same + torch.randn(same.shape, generator=draw) * 12).clamp(0, 255).byte()
    noise = torch.randint(0, 256, same.shape, generator=draw, dtype=torch.uint8)
    values = [measure_tiny(tmp_path / str(i), fake, real)[0] for i, fake in enumerate((same, noisy, noise))]
    assert values[0] < values[1] / 2 < values[2] / 4
