from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.faces.recognizer import cut_faces
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.prior import Prior
from pfstorer_rt.progress import CancelledError, ignore_progress
from pfstorer_rt.training.autoencoder import AutoencoderConfig
from pfstorer_rt.training.capture import WARM_UP, RecordedStep
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.joint import JointBatches, JointConfig, JointObjective, draw_corners
from pfstorer_rt.training.loop import Training, run_training
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.one_step import EYES, OneStepConfig, cut_strips
from pfstorer_rt.training.people import find_people
from pfstorer_rt.training.photo_store import GeneratedPeople, Photographs, read_store
from pfstorer_rt.training.prior import ReferenceObjective, feature_scales
from pfstorer_rt.training.tiles import Source
from pfstorer_rt.training.view_batches import Layout, ViewBatches
from pfstorer_rt.training.view_stages import ViewStagesConfig, mean_embeddings, train_on_views, with_minutes
from pfstorer_rt.training.views import FACE
from tests.training.test_one_step import NANO

TRAIN = TrainConfig(iterations=2, batch=6, learning_rate=1e-3, precision="fp32", device="cpu", ema=0.5)
JOINT = JointConfig(OneStepConfig(train=TRAIN, window=3, clean=0.2), references=2, refill=1, refill_every=2)
CONFIG = ViewStagesConfig(
    AutoencoderConfig(train=replace(TRAIN, batch=2), crop=48, patch=32, patches=1, lambda_perceptual=0.4),
    replace(TRAIN, ema=0.0),
    JOINT,
    matching_batches=2,
)


class Generator:
    """Images whose values are all the number of their person and of the image."""

    def people(self, count, per_person, *, seed, size, **_):
        people = torch.arange(seed, seed + count, dtype=torch.uint8)[:, None] % 16 * 16
        values = people + torch.arange(per_person, dtype=torch.uint8)
        return values[..., None, None, None].expand(-1, -1, 3, size, size).contiguous()


class Recognizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Conv2d(3, 128, 7, 7)
        self.requires_grad_(False)

    def forward(self, faces):
        return self.embed(faces)[0]

    def embed(self, faces):
        features = self.network(faces)
        return features.mean((2, 3)), [features]


@pytest.fixture
def base():
    return build_base(NANO, seed=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two people with 2 and 3 photographs, one portrait, and two other photographs."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("people/a/1", "people/a/2", "people/b/1", "people/b/2", "people/b/3", "portraits/1", "any/1", "any/2"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (160, 150, 3), np.uint8)).save(path)
    return root


def open_store(folders, generator=True):
    people = find_people([folders / "people"])
    photographs = Photographs(people, [folders / "portraits/1.png"], [Source(sorted((folders / "any").iterdir()), 1.0)])
    generated = GeneratedPeople(Generator(), torch.empty(4, 3, 3, 256, 256, dtype=torch.uint8)) if generator else None
    if generated is not None:
        generated.refill(3)
    return read_store(photographs, 128, 3, torch.device("cpu"), generated)


def train(folders, base, work, config, lpips, on_progress=ignore_progress):
    networks = Lpips(lpips), Recognizer()
    train_on_views(lambda _: open_store(folders), base, work, config, *networks, on_progress=on_progress)


def test_three_stages_make_a_base_with_a_prior_and_resume(folders, base, random_lpips, tmp_path):
    before = base.vae.encoder.conv_in.weight.clone(), base.unet.conv_in.weight.clone()
    train(folders, base, tmp_path / "work", CONFIG, random_lpips)
    assert not torch.equal(base.vae.encoder.conv_in.weight, before[0])
    assert not torch.equal(base.unet.conv_in.weight, before[1])
    base.save(tmp_path / "base", torch.float16)
    loaded = load_base(tmp_path / "base")
    assert loaded.fingerprint == base.fingerprint and loaded.prior is not None
    assert all(block.gamma.mean() > 0.2 for block in loaded.prior.blocks)
    assert not any(p.requires_grad for p in base.unet.parameters())
    for stage in ("autoencoder", "matching", "joint"):
        assert torch.load(tmp_path / "work" / f"{stage}.pt", weights_only=True)["iteration"] == 2
        assert len((tmp_path / "work" / f"{stage}.csv").read_text().splitlines()) == 2
    header = (tmp_path / "work" / "joint.csv").read_text().splitlines()[0]
    terms = "latent,pixel,perceptual,adversarial,discriminator,color,repeated,id,eyes"
    assert header == f"iteration,loss,{terms},id_known,id_plain"


def test_an_interrupted_training_continues(folders, random_lpips, tmp_path):
    reached = []

    def stop(progress):
        reached.append((progress.stage, progress.done))
        if reached[-1] == ("joint", 1):
            raise CancelledError

    with pytest.raises(CancelledError):
        train(folders, build_base(NANO, seed=1), tmp_path, CONFIG, random_lpips, stop)
    reached.clear()
    base = build_base(NANO, seed=1)
    train(
        folders, base, tmp_path, CONFIG, random_lpips, lambda progress: reached.append((progress.stage, progress.done))
    )
    assert reached == [("autoencoder", 2), ("matching", 2), ("joint", 1), ("joint", 2)]
    assert base.prior is not None


def batches_of(folders, layout, generator=True):
    return ViewBatches(open_store(folders, generator), layout)


def test_references_are_other_images_of_the_same_person(folders):
    """Each generated image has one value, which names its person and the image."""
    layout = Layout(generated=3, people=0, faces=0, portraits=0, mosaics=0, tiles=1)
    batches, same = batches_of(folders, layout), 0
    for seed in range(8):
        tiles, references, faces, views = batches.originals(2, np.random.default_rng(seed))
        assert tiles.shape == (4, 3, 128, 128) and references.shape == (3, 2, 3, 128, 128) and faces.shape == (3, 2, 3)
        assert views.shape == (3, 2, 2, 3)
        target = (tiles[:3].mean((1, 2, 3)) * 255).round()
        others = (references.mean((2, 3, 4)) * 255).round()
        assert torch.equal(others // 16, (target // 16)[:, None].expand(-1, 2))
        same += int((others == target[:, None]).all(1).sum())
    assert same < 8, "few references are views of the same image"


def test_references_of_real_people_are_other_photographs(folders):
    layout = Layout(generated=0, people=6, faces=0, portraits=0, mosaics=0, tiles=0)
    batches = batches_of(folders, layout)
    store = batches.store
    for number in range(len(store.photos)):
        store.photos[number] = 10 * number
    assert store.first.tolist() == [0, 2, 5]
    for seed in range(8):
        tiles, references, *_ = batches.originals(3, np.random.default_rng(seed))
        target = (tiles.mean((1, 2, 3)) * 25.5).round().int()
        others = (references.mean((2, 3, 4)) * 25.5).round().int()
        assert not (others == target[:, None]).any()
        assert torch.equal(others >= 2, (target >= 2)[:, None].expand(-1, 3)) and others.max() < 5


def test_a_batch_is_divided_as_described():
    assert Layout.of(64, True) == Layout(26, 6, 8, 8, 6, 10)
    assert Layout.of(64, False) == Layout(0, 32, 0, 22, 0, 10)
    assert Layout.of(64, True).known == 32 and Layout.of(64, True).aligned == 48 and Layout.of(64, True).total == 64


def test_batches_without_a_generator(folders):
    layout = Layout.of(6, False)
    made = batches_of(folders, layout, generator=False)(2, 0.5, np.random.default_rng(0))
    assert made.hq.shape == made.lq.shape == (6, 3, 128, 128) and len(made.faces) == layout.aligned
    assert made.references.shape == (layout.known, 2, 3, 128, 128)
    assert made.hq.min() >= -1 and made.hq.max() <= 1


def test_a_share_of_the_tiles_is_not_degraded(folders):
    batches = batches_of(folders, Layout(0, 8, 0, 8, 0, 0))
    clean = batches(1, 1.0, np.random.default_rng(0))
    assert torch.equal(clean.hq, clean.lq)
    degraded = batches(1, 0.0, np.random.default_rng(0))
    assert not any(torch.equal(a, b) for a, b in zip(degraded.hq, degraded.lq, strict=True))


def test_windows_lie_on_faces():
    faces = np.tile(np.array([[0.2, 0, 0.5], [0, 0.2, -0.25]]), (50, 1, 1))  # centre at (96, 48) of 128 pixels
    corners = draw_corners(60, faces, 32, 128, 1.0, np.random.default_rng(0))
    centre = corners[:50] + 16
    assert np.abs(centre - [48, 96]).max() <= 0.35 * 64 + 1
    assert corners.min() >= 0 and corners.max() <= 96 and np.ptp(corners[50:]) > 30


def test_the_positions_of_faces_in_references_are_known(folders):
    """Each photograph has a white square in the middle of the face's square."""
    batches = batches_of(folders, Layout(generated=3, people=3, faces=0, portraits=0, mosaics=0, tiles=0))
    store, (x, y) = batches.store, FACE[:2, 2]
    for images in (store.photos, store.generated.images.flatten(0, 1)):
        side, images[:] = images.shape[-1], 0
        top, left = (round((v + 1) / 2 * side - side / 20) for v in (y, x))
        images[..., top : top + side // 10, left : left + side // 10] = 255
    for seed in range(4):
        _, references, _, positions = batches.originals(2, np.random.default_rng(seed))
        faces = cut_faces(references.flatten(0, 1), torch.from_numpy(positions.reshape(-1, 2, 3)).float())
        assert faces[..., 70:80, 70:80].mean() > 0.9, "the square covers the middle"
        assert faces[..., :50, :].mean() < 0.1


def test_the_strip_of_the_eyes_lies_above_the_middle_of_the_face():
    """A face that fills the image: the eyes are 0.38 of half its side above the middle."""
    image = torch.zeros(1, 3, 200, 200)
    image[:, :, 46:79, 34:166] = torch.linspace(0, 1, 132)
    image[:, :, 46 + 33 :] = 5.0
    strip = cut_strips(image, torch.eye(3)[None, :2] @ torch.tensor(EYES))
    assert strip.shape == (1, 3, 64, 256) and strip.max() <= 5
    np.testing.assert_allclose(strip[0, 0, 32, 2:-2].numpy(), np.linspace(0, 1, 256)[2:-2], atol=0.01)
    assert strip[..., :60, :].max() <= 1


def test_some_embeddings_are_unknown_and_the_others_inexact(folders, base):
    views = ViewBatches(open_store(folders), Layout.of(24, True))
    config = replace(JOINT, unknown=0.3, inexact=0.01, kept=2, fresh=0.0)
    mean = torch.full((128,), 7.0)
    batches = JointBatches(views, torch.no_grad()(base.encode), lambda *_: torch.zeros(12, 128), mean, config)
    faces = torch.cat([batches(0, number)["face"] for number in range(20)])
    unknown = (faces == mean).all(1)
    assert 0.2 < unknown.float().mean() < 0.4
    assert faces[~unknown].std().item() == pytest.approx(0.01, rel=0.05)


class Again:
    """Stands in for CUDA graphs: a recorded iteration is the same function, called again on the same memory."""

    def __init__(self):
        self.recorded = 0

    def prepare(self, optimizer, device):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=device)

    def warm_up(self, run):
        return run()

    def record(self, run):
        self.recorded += 1
        return run


embed = partial(mean_embeddings, Recognizer())


def joint_training(folders, random_lpips, work, iterations, recorder):
    """Train a new base jointly; returns the losses of every iteration and the trained weights."""
    settings = replace(TRAIN, iterations=iterations, warmup=2, decay=0.5)
    config = replace(JOINT, base=replace(JOINT.base, train=settings), kept=3)
    base, losses = build_base(NANO, seed=1), []
    with accelerated(settings, base) as accelerator:
        views = ViewBatches(open_store(folders), Layout.of(settings.batch, True))
        latents = base.encode(torch.zeros(2, 3, 128, 128)) + torch.arange(2.0).view(2, 1, 1, 1)
        known = ReferenceObjective(base, feature_scales(base, latents))
        torch.manual_seed(3)
        objective = JointObjective(base, config, Lpips(random_lpips), Recognizer(), known)
        objective.register_forward_hook(lambda *values: losses.append(values[-1]["loss"].item()))
        batches = JointBatches(views, torch.no_grad()(base.encode), embed, torch.zeros(128), config)
        groups = objective.groups(base, config)
        run_training(Training("joint", objective, batches, settings, work, "", groups, recorder=recorder), accelerator)
    return losses, base.unet.conv_in.weight.detach().clone()


def test_recorded_iterations_equal_iterations_done_anew(folders, random_lpips, tmp_path, monkeypatch):
    monkeypatch.setattr("pfstorer_rt.training.capture.WARM_UP", 1)
    count = 3  # with two sets of shapes, at least one of them is recorded
    expected = joint_training(folders, random_lpips, tmp_path / "a.pt", count, None)
    recorder = Again()
    found = joint_training(folders, random_lpips, tmp_path / "b.pt", count, recorder)
    assert recorder.recorded > 0
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and len(set(found[0])) == count
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-4)


def test_every_set_of_shapes_is_recorded_once():
    seen, recorder = [], Again()
    step = RecordedStep(lambda batch: seen.append(batch["x"]) or {"loss": batch["x"].sum()}, recorder)
    for i in range(2 * WARM_UP + 6):
        assert step({"x": torch.full((1 + i % 2,), float(i))})["loss"] == i * (1 + i % 2)
    assert recorder.recorded == 2 and len({x.data_ptr() for x in seen}) == 2


class NoWaiting(TorchDispatchMode):
    """Fails at operations whose result the host has to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, f"the host waits for {name}"
        if name == "index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


def test_an_iteration_never_waits_for_the_device(folders, base, random_lpips):
    views = ViewBatches(open_store(folders), Layout.of(6, True))
    known = ReferenceObjective(base, feature_scales(base, torch.randn(2, 4, 8, 8)))
    objective = JointObjective(base, JOINT, Lpips(random_lpips), Recognizer(), known)
    objective.groups(base, JOINT)
    for block in objective.blocks:  # the second layer of the feed-forward network starts at 0
        torch.nn.init.normal_(block.block.ff.net[2].weight, std=0.1)
    batch = JointBatches(views, torch.no_grad()(base.encode), embed, torch.zeros(128), JOINT)(0, 0)
    with NoWaiting():
        objective(batch)["loss"].backward()
    assert all(p.grad is not None for p in objective.blocks.parameters())
    assert all(linear.weight.grad.abs().sum() > 0 for linear in objective.shifts.maps)


def test_a_grid_that_the_decoder_adds_increases_the_joint_loss(folders, base, random_lpips, monkeypatch):
    views = ViewBatches(open_store(folders), Layout.of(6, True))
    known = ReferenceObjective(base, feature_scales(base, torch.randn(2, 4, 8, 8)))
    objective = JointObjective(base, JOINT, Lpips(random_lpips), Recognizer(), known)
    batch = JointBatches(views, torch.no_grad()(base.encode), embed, torch.zeros(128), JOINT)(0, 0)
    dots = (torch.arange(batch["hq_image"].shape[-1]) % base.config.factor == 0).float()
    monkeypatch.setattr(objective, "decode", lambda *_: batch["hq_image"] + 0.1 * dots[:, None] * dots)
    losses = objective(batch)
    objective.config = replace(JOINT.base, lambda_repeated=0.0)
    without = objective(batch)
    assert losses["repeated"] > 5e-4
    torch.testing.assert_close(losses["loss"] - without["loss"], 4 * losses["repeated"], rtol=0, atol=1e-5)


def test_a_finished_base_with_a_prior_needs_the_joint_training_alone(folders, base, random_lpips, tmp_path):
    encoder = base.vae.encoder.conv_in.weight.clone()
    base.prior = Prior(base.unet, base.config)
    base.prior.shifts.mean.fill_(0.25)
    for block in base.prior.blocks:
        block.gamma.data.fill_(0.5)
    train(folders, base, tmp_path, replace(CONFIG, autoencoder=None), random_lpips)
    assert not (tmp_path / "autoencoder.pt").exists() and not (tmp_path / "matching.pt").exists()
    assert torch.equal(base.vae.encoder.conv_in.weight, encoder)
    assert all(block.gamma.mean() > 0.4 for block in base.prior.blocks)
    assert base.prior.shifts.mean[0] == 0.25 and all(linear.weight.any() for linear in base.prior.shifts.maps)
    config = with_minutes(replace(ViewStagesConfig(), autoencoder=None), 8, matching=False)
    assert config.joint.base.train.minutes == pytest.approx(8)


def test_minutes_are_divided_among_the_stages():
    config = with_minutes(ViewStagesConfig(), 16)
    minutes = [config.autoencoder.train.minutes, config.matching.minutes, config.joint.base.train.minutes]
    assert minutes == pytest.approx([1.4, 1.0, 13.6])


def test_graphs_need_a_gpu(folders, base, random_lpips, tmp_path):
    with pytest.raises(MissingBackendError, match="CUDA graphs need"):
        train(folders, base, tmp_path, replace(CONFIG, graphs=True), random_lpips)


def test_views_need_feature_wrapping(folders, random_lpips, tmp_path):
    with pytest.raises(BadFileError, match="no feature wrapping"):
        train(folders, build_base(replace(NANO, cfw=None)), tmp_path, CONFIG, random_lpips)
