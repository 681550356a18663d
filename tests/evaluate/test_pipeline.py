"""An evaluation as a pipeline: on a GPU the host queues chunk after chunk, and waits in one place, a thread beside.

The GPU is simulated (helpers/fake_gpu.py); a real one computes the same, and its bytes are compared in test_truth.py.
"""

import threading
import weakref

import pytest
import torch
from fake_gpu import GPU, TORCH, Event, fake_gpu
from latent_models import latent_models
from small_models import pixel_checkpoint

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate import measure
from alphaflow_cli.evaluate.features import Extractor, normalise
from alphaflow_cli.evaluate.measure import Clock, Pass, run_pass
from alphaflow_cli.evaluate.pictures import GeneratedImages
from alphaflow_cli.evaluate.tiny import Tiny
from alphaflow_cli.runtime.processes import Processes
from alphaflow_cli.sample.generator import open_generator
from alphaflow_cli.sample.walk import plan_walk

needs_fake_gpu = pytest.mark.skipif(TORCH < (2, 11), reason="older torch asks the driver what a fake GPU can do")
CPU, CHUNK = torch.device("cpu"), 32


class Wide(Extractor):
    """A network whose pictures are normalised as DINOv2's are."""

    id, dim, weights_sha256, preprocessing, known = "wide", 3, "", "", True

    def features(self, images):
        return normalise(images.float(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)).mean((2, 3))


def pass_of(generator, folder, extractors, *, count=96, nfe=2, kind="consistency"):
    walk = plan_walk(generator.recipe, nfe=nfe, kind=kind)
    return Pass(GeneratedImages(generator, walk, count=count, draw="random"), extractors, folder, CHUNK)


def moved(module):
    """The module with its weights on the simulated GPU; `.to` cannot put them there."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: value.detach().to(GPU) for name, value in held.items() if value is not None})
    return module


def to_gpu(generator):
    """A generator that was read on the host goes to the simulated GPU."""
    moved(generator.net)
    moved(generator.autoencoder.module)
    generator.device = generator.exact = GPU
    generator.mean, generator.std = generator.mean.to(GPU), generator.std.to(GPU)
    return generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return latent_models(tmp_path_factory.mktemp("latent"))


@needs_fake_gpu
def test_the_host_waits_once_for_a_chunk_and_only_in_the_thread_beside(folder, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(measure, "_write", lambda path, tensors, notes: written.append((path.name, tensors)))
    generator = open_generator(str(folder / "fp32.safetensors"), device=CPU)
    assert generator.autoencoder.module is not None  # it is read before the first chunk
    with fake_gpu(monkeypatch) as gpu:
        work = pass_of(to_gpu(generator), tmp_path, {"tiny": moved(Tiny()), "wide": Wide()})
        before = gpu.on_device
        gpu.found.clear()
        clock = Clock()
        run_pass(work, Processes(GPU), batch=16, clock=clock)
    assert gpu.found == []
    assert gpu.on_device - before > 300
    assert len(written) == 3
    beside = {name for name in Event.waits if name != threading.current_thread().name}
    assert len(beside) == 1
    assert len(Event.waits) == 2 * 3  # for the content of each chunk, and for the flags that came with it
    assert set(Event.waits) == beside
    assert clock.seconds == pytest.approx({"pictures": 0.003, "features tiny": 0.003, "features wide": 0.003})
    assert work.source.seconds == pytest.approx({"network": 0.003, "decoder": 0.003})


@pytest.fixture
def noise(tmp_path):
    """A generator whose pictures are its noise, 3×16×16."""
    pixel_checkpoint(tmp_path / "noise.safetensors", side=16)
    return open_generator(str(tmp_path / "noise.safetensors"), device=CPU)


def test_values_that_are_not_finite_are_refused_and_the_chunks_before_are_kept(noise, tmp_path, monkeypatch):
    """The thread beside finds them; its error is the command's."""
    decoded = noise._decoded

    def breaking(latents):
        pixels = decoded(latents).clone()
        made.append(len(pixels))
        if len(made) == 3:
            pixels[5, 0, 0, 0] = torch.inf
        return pixels

    made = []
    monkeypatch.setattr(noise, "_decoded", breaking)
    work = pass_of(noise, tmp_path / "evals", {"tiny": Tiny()}, nfe=1, kind="auto", count=160)
    with pytest.raises(
        AlphaflowError, match=r"^1 of 32 pictures have values that are not finite \(the first: number 5"
    ):
        run_pass(work, Processes(CPU), batch=16, clock=Clock())
    assert sorted(path.name for path in work.folder.iterdir()) == [work.path(*each).name for each in work.chunks()[:2]]
    monkeypatch.setattr(noise, "_decoded", decoded)
    run_pass(work, Processes(CPU), batch=16, clock=Clock())  # with the same source, whose queue was given up
    whole = pass_of(noise, tmp_path / "whole", {"tiny": Tiny()}, nfe=1, kind="auto", count=160)
    run_pass(whole, Processes(CPU), batch=7, clock=Clock())
    for each in work.chunks():
        assert work.path(*each).read_bytes() == whole.path(*each).read_bytes()


def test_pictures_in_memory_do_not_grow_with_the_count(noise, tmp_path):
    drawn, alive = [], []
    work = pass_of(noise, tmp_path / "evals", {"tiny": Tiny()}, nfe=1, kind="auto", count=12 * CHUNK)
    images = work.source.images

    def watched(start, stop):
        alive.append(sum(each() is not None for each in drawn))
        found = images(start, stop)
        drawn.append(weakref.ref(found))
        return found

    work.source.images = watched
    run_pass(work, Processes(CPU), batch=16, clock=Clock())
    assert len(drawn) == 12
    assert max(alive) <= 2
    assert len(work.source._queued) == 0
