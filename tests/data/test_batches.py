"""The stream: a pure function of (seed, step), each sample once per epoch, the posterior's and the data's moments."""

import numpy as np
import pytest
import torch
from counting import peak_bytes
from latent_stores import moments_store, random_moments, write_store

from alphaflow_cli.core.draws import mix_seed
from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.errors import AlphaflowError

OPTIONS = {
    "batch": 24,
    "seed": 0,
    "posterior": "sample",
    "flips": False,
    "normalise": "position",
    "scale": 1.0,
    "shift": 0.0,
    "stats_images": 0,
    "device": torch.device("cpu"),
}
ALL = slice(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moments_store(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    rows, flip = random_moments(100), random_moments(100, seed=1)
    tensors = {"moments": rows, "moments_flip": flip}
    return write_store(tmp_path_factory.mktemp("mirrored") / "s", tensors, np.arange(100) % 10, flips=True)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    pictures = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pixels") / "s"
    return write_store(path, {"pixels": pictures}, np.arange(60) % 10, kind="pixels", flips=True), pictures


def stream(path, **changes):
    return LatentStream(path, **{**OPTIONS, **changes})


def same(a, b):
    return torch.equal(a.latents, b.latents) and torch.equal(a.y, b.y)


@pytest.mark.parametrize("batch", [7, 24, 100, 250])
def test_every_sample_comes_once_per_epoch(store, batch):
    found = stream(store, batch=batch)
    steps = -(-3 * 100 // batch)
    order = np.concatenate([found.samples_at(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * 100 : (epoch + 1) * 100]) == list(range(100))
    assert list(order[:100]) != list(order[100:200])


def test_a_step_needs_no_other_step(store):
    walked, jumped = stream(store), stream(store)
    batches = [walked.batch_at(step, ALL) for step in range(12)]
    assert same(jumped.batch_at(11, ALL), batches[11])
    assert same(walked.batch_at(2, ALL), batches[2])


def test_processes_see_the_rows_of_one_global_batch(store):
    whole = stream(store).batch_at(9, ALL)
    for rank in range(2):
        part = stream(store).batch_at(9, slice(rank, None, 2))
        assert torch.equal(part.latents, whole.latents[rank::2])
        assert torch.equal(part.y, whole.y[rank::2])
    some = stream(store).batch_at(9, torch.tensor([5, 0, 17]))
    assert torch.equal(some.latents, whole.latents[[5, 0, 17]])


def test_another_seed_is_another_order_and_other_noise(store):
    one, other = stream(store), stream(store, seed=1)
    assert list(one.samples_at(0)) != list(other.samples_at(0))
    assert not torch.equal(one.noise_at(0), other.noise_at(0))
    assert not torch.equal(one.noise_at(0), one.noise_at(1))


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("options", [{"resident": True}, {"prefetch": True}, {"verify": "sizes"}])
def test_the_way_of_reading_changes_no_bit(mirrored, options, flips):
    plain, other = stream(mirrored, flips=flips), stream(mirrored, flips=flips, **options)
    for step in (0, 1, 2, 7, 3):
        for rows in (slice(0, 12), slice(12, 24)):
            assert same(plain.batch_at(step, rows), other.batch_at(step, rows))
    other.close()


@pytest.mark.parametrize("flips", [False, True])
def test_a_resident_store_needs_one_shard_beside_it_to_load(tmp_path, flips):
    """The highest sum of live allocations, as the profiler saw them; 20 shards and half a shard."""
    tensors = {"moments": random_moments(328, side=8), "moments_flip": random_moments(328, side=8, seed=1)}
    path = write_store(tmp_path / "s", tensors, np.arange(328) % 10, flips=True)
    kept = []
    peak = peak_bytes(lambda: kept.append(stream(path, flips=flips, resident=True)), "cpu")
    there = kept[0]._resident
    for name in there.keys() - {"label"}:
        np.testing.assert_array_equal(there[name].numpy(), tensors[name])
    assert set(there) == {"label", "moments"} | ({"moments_flip"} if flips else set())
    assert there["label"].tolist() == [i % 10 for i in range(328)]
    size, shard = sum(tensor.nbytes for tensor in there.values()), tensors["moments"][:16].nbytes
    assert size <= peak < size + 1.5 * shard


def test_labels_and_latents_belong_together(store):
    found = stream(store, normalise="scale", posterior="mean")
    rows = random_moments(100)[:, :4].astype(np.float32)
    batch = found.batch_at(1, ALL)
    np.testing.assert_array_equal(batch.latents.numpy(), rows[found.samples_at(1)])
    np.testing.assert_array_equal(batch.y.numpy(), found.samples_at(1) % 10)
    assert batch.latents.dtype == torch.float32
    assert batch.y.dtype == torch.int64


def test_a_drawn_latent_has_the_posteriors_moments(store):
    """Over many draws of each sample: mean m and std s, to the accuracy of the count."""
    found = stream(store, normalise="scale", batch=100)
    rows = random_moments(100).astype(np.float64)
    total, squares, steps = np.zeros((100, 4, 4, 4)), np.zeros((100, 4, 4, 4)), 400
    for step in range(steps):
        z = (found.batch_at(step, ALL).latents.numpy() - rows[found.samples_at(step), :4]) / rows[
            found.samples_at(step), 4:
        ]
        total[found.samples_at(step)] += z
        squares[found.samples_at(step)] += z**2
    assert abs(total.mean() / steps) < 5e-3
    assert abs(squares.mean() / steps - 1) < 5e-3
    assert np.abs(total / steps).max() < 6 / np.sqrt(steps)


def test_normalised_latents_have_mean_zero_and_std_one(store):
    found = stream(store, batch=100)
    drawn = torch.cat([found.batch_at(step, ALL).latents for step in range(300)]).double()
    assert drawn.mean(0).abs().max() < 0.02
    assert (drawn.std(0) - 1).abs().max() < 0.02
    by_channel = stream(store, batch=100, normalise="channel")
    drawn = torch.cat([by_channel.batch_at(step, ALL).latents for step in range(100)]).double()
    assert drawn.mean((0, 2, 3)).abs().max() < 0.02
    assert (drawn.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 0.02


def test_x_is_latent_minus_mean_over_std(store):
    raw, found = stream(store, normalise="scale"), stream(store)
    assert found.mean.dtype == torch.float64
    assert found.mean.shape == found.shape
    expected = (raw.batch_at(4, ALL).latents - found.mean) / found.std
    torch.testing.assert_close(found.batch_at(4, ALL).latents.double(), expected, atol=1e-5, rtol=1e-5)


def test_scale_and_shift_follow_the_autoencoders_convention(store):
    raw, found = stream(store, normalise="scale"), stream(store, normalise="scale", scale=0.3611, shift=0.1159)
    expected = (raw.batch_at(0, ALL).latents - 0.1159) * 0.3611
    torch.testing.assert_close(found.batch_at(0, ALL).latents, expected)


def test_statistics_of_fewer_images_are_computed_from_as_many(store):
    all_, few = stream(store, stats_images=0), stream(store, stats_images=30)
    assert torch.equal(all_.mean, stream(store, stats_images=2048).mean)  # the store has fewer than the published 2,048
    assert not torch.equal(all_.mean, few.mean)
    assert (few.mean - all_.mean).abs().max() < 5 * (all_.std / 30**0.5).max()


def test_flips_show_each_side_half_of_the_time(mirrored):
    found = stream(mirrored, flips=True, posterior="mean", normalise="scale")
    sides = [random_moments(100, seed=seed)[:, :4].astype(np.float32) for seed in (0, 1)]
    shown = 0
    for step in range(100):
        flipped, samples = found.flips_at(step), found.samples_at(step)
        expected = np.where(flipped[:, None, None, None], sides[1][samples], sides[0][samples])
        np.testing.assert_array_equal(found.batch_at(step, ALL).latents.numpy(), expected)
        shown += int(flipped.sum())
    assert abs(shown / 2400 - 0.5) < 0.05


def test_statistics_count_mirror_images_only_where_they_are_drawn(mirrored):
    rows, flip = (random_moments(100, seed=seed)[:, :4].astype(np.float64) for seed in (0, 1))
    np.testing.assert_allclose(stream(mirrored).mean, rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(stream(mirrored, flips=True).mean, (rows.mean(0) + flip.mean(0)) / 2, atol=1e-12)


def test_pixels_are_mirrored_when_read(pixels):
    path, pictures = pixels
    found = stream(path, flips=True, normalise="scale")
    flipped, samples = found.flips_at(2), found.samples_at(2)
    expected = pictures[samples].astype(np.float32) / 127.5 - 1
    expected[flipped] = expected[flipped][..., ::-1]
    np.testing.assert_allclose(found.batch_at(2, ALL).latents.numpy(), expected, atol=1e-6)
    assert flipped.any()
    assert not flipped.all()
    mean = stream(path, flips=True).mean
    torch.testing.assert_close(mean, mean.flip(-1))


def test_flips_that_the_store_does_not_have_are_refused(store):
    with pytest.raises(AlphaflowError, match="--flips"):
        stream(store, flips=True)


def test_a_latent_that_never_varies_is_refused_with_the_way_out(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    pictures[:, :, 0, 0] = 7
    path = write_store(tmp_path / "s", {"pixels": pictures}, np.zeros(20), kind="pixels")
    with pytest.raises(AlphaflowError, match=r"3 of 192 latent values never vary; set data\.normalise: channel"):
        stream(path)
    assert torch.isfinite(stream(path, normalise="channel").batch_at(0, ALL).latents).all()


def test_a_corrupted_shard_is_refused_before_the_first_batch(tmp_path):
    path = moments_store(tmp_path / "s")
    data = bytearray((path / "train-00003.safetensors").read_bytes())
    data[-5] ^= 4
    (path / "train-00003.safetensors").write_bytes(data)
    with pytest.raises(AlphaflowError, match="train-00003"):
        stream(path)


def test_a_label_out_of_range_is_refused(tmp_path):
    path = write_store(tmp_path / "s", {"moments": random_moments(4)}, [0, 1, 2, 10])
    with pytest.raises(AlphaflowError, match="label"):
        stream(path)


def test_seeds_differ_in_every_part_and_in_order():
    seeds = {mix_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert mix_seed(0) != mix_seed(0, 0)
    assert mix_seed(-1) == mix_seed((1 << 64) - 1)


def test_seeds_are_pinned_because_runs_are_resumed_across_versions():
    assert mix_seed(0, 1, 0) == 5352869105593375612
