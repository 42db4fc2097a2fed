import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.degradation.levels import LEVELS
from pfstorer_rt.errors import BadFileError, MismatchError, MissingBackendError, PFStorerError
from pfstorer_rt.files import sha256_file
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.prompt import tokenize
from pfstorer_rt.progress import ignore_progress
from pfstorer_rt.training.data import center_crop, read_photo
from pfstorer_rt.training.image_loss import ImageSpaceLoss
from pfstorer_rt.training.memory import frozen_weights_in
from pfstorer_rt.training.objectives import DreamBoothObjective, PersonalizationObjective
from pfstorer_rt.training.personalize import parameter_groups, personalize
from pfstorer_rt.training.pool import BatchMaker, make_pool, reduced

METHODS = ("pfstorer", "vico", "dreambooth")


@pytest.fixture(scope="module")
def base():
    return build_base("nano", seed=3)


@pytest.fixture
def learn(base, photos, tmp_path):
    """Function (file name, method, on_progress, note, finish, **TrainConfig fields) -> Identity, saved in tmp_path."""

    def call(name, method="pfstorer", on_progress=ignore_progress, note=lambda _: None, finish=False, **settings):
        train = TrainConfig(**{"iterations": 2, "batch": 1, "device": "cpu", "precision": "fp32", **settings})
        config = PersonalizeConfig(method=method, train=train, p_self=0.5, pool=3)
        output = tmp_path / f"{name}.safetensors"
        return personalize("alice", photos, base, config, output, note, on_progress, finish)

    return call


def same(a, b):
    return set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def after(iterations, action):
    """A progress callback that calls `action` after the given number of iterations."""

    def report(progress):
        if progress.stage == "personalize alice" and progress.done == iterations:
            action()

    return report


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def die(progress=None):
    if progress is None or progress.stage != "photographs":  # photographs are read first
        raise SystemExit("power cut")


# ---- resuming


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(learn, tmp_path, method):
    whole = learn("whole", method, iterations=6)
    with pytest.raises(KeyboardInterrupt, match="after iteration 3 of 6"):
        learn("parts", method, after(3, interrupt), iterations=6)
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.crops", "parts.training.pt"]
    assert same(learn("parts", method, after(0, die), iterations=6), whole), "it resumes after iteration 3"
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.crops"))


def test_a_killed_run_resumes_from_its_last_checkpoint(learn, tmp_path):
    whole = learn("whole", iterations=6, checkpoint_every=2)
    with pytest.raises(SystemExit):
        learn("parts", on_progress=after(5, die), iterations=6, checkpoint_every=2)
    assert torch.load(tmp_path / "parts.training.pt", weights_only=True)["iteration"] == 4
    assert same(learn("parts", iterations=6, checkpoint_every=2), whole)


def test_a_run_killed_before_writing_the_identity_is_not_trained_again(learn, tmp_path):
    whole = learn("whole", iterations=3)
    (tmp_path / "parts.safetensors").mkdir()  # the identity cannot be written
    with pytest.raises(PFStorerError, match="it is a folder"):
        learn("parts", iterations=3)
    (tmp_path / "parts.safetensors").rmdir()
    reports = []
    assert same(learn("parts", on_progress=reports.append, iterations=3), whole)
    assert [r.done for r in reports if r.stage == "personalize alice"] == [3]


@pytest.fixture
def interrupted(learn):
    """Function (file name, **TrainConfig fields): a training that is interrupted after 3 iterations of 6."""

    def call(name, **settings):
        with pytest.raises(KeyboardInterrupt):
            learn(name, on_progress=after(3, interrupt), **{"iterations": 6, **settings})

    return call


def test_a_checkpoint_of_another_run_is_refused_before_crops_are_made(learn, interrupted, tmp_path):
    interrupted("a")
    before = (tmp_path / "a.training.pt").read_bytes()
    for change in ({"seed": 1}, {"learning_rate": 1e-3}, {"method": "vico"}):
        with pytest.raises(MismatchError, match="other settings or photographs"):
            learn("a", on_progress=die, **{"iterations": 6, **change})
    assert (tmp_path / "a.training.pt").read_bytes() == before
    (tmp_path / "a.training.pt").write_bytes(before[:-1000])
    with pytest.raises(BadFileError, match="delete it"):
        learn("a", on_progress=die, iterations=6)


def test_crops_are_made_once_and_deleted_with_the_training(learn, interrupted, tmp_path):
    interrupted("a")
    folder = tmp_path / "a.crops"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and (folder / "latents.npy").exists()
    reports = []
    learn("a", on_progress=reports.append, iterations=6)
    assert [(r.done, r.total) for r in reports if r.stage == "crops"] == [(3, 3)]
    assert not folder.exists()


DAMAGE = {
    "no JSON": ("crops.json", lambda data: b"{"),
    "other JSON": ("crops.json", lambda data: b"[1]"),
    "too many": ("crops.json", lambda data: data.replace(b": 3,", b": 300,")),
    "cut array": ("latents.npy", lambda data: data[:300]),
    "empty array": ("latents.npy", lambda data: b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_crops_are_made_again(learn, interrupted, tmp_path, kind):
    interrupted("a")
    name, damage = DAMAGE[kind]
    path = tmp_path / "a.crops" / name
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    assert same(learn("a", iterations=6), learn("whole", iterations=6))


def test_another_number_of_iterations_resumes_exactly_while_the_rate_is_constant(learn, interrupted):
    for iterations in (5, 9):
        notes = []
        interrupted("parts", decay=0.4)  # the rate falls after iteration 3 of 5, 3.6 of 6 and 5.4 of 9
        resumed = learn("parts", note=notes.append, iterations=iterations, decay=0.4)
        assert same(resumed, learn("whole", iterations=iterations, decay=0.4))
        assert not any("iterations" in note for note in notes)


def test_another_number_of_iterations_is_noted_where_the_rate_has_fallen(learn, interrupted):
    notes = []
    interrupted("a", decay=1.0)
    longer = learn("a", note=notes.append, iterations=9, decay=1.0)
    assert any("planned for 6 iterations" in note for note in notes)
    assert longer.settings["train"]["iterations"] == 9


@pytest.mark.parametrize("call", [{"finish": True, "iterations": 6}, {"iterations": 2}])
def test_a_training_can_end_at_its_last_checkpoint(learn, interrupted, tmp_path, call):
    interrupted("a")
    reports, notes = [], []
    made = learn("a", on_progress=reports.append, note=notes.append, **call)
    assert same(made, learn("whole", iterations=3)), "the weights of three iterations"
    assert made.settings["train"]["iterations"] == 3 and any("3 iterations are done" in note for note in notes)
    assert {r.done for r in reports if r.stage == "personalize alice"} == {3}
    assert [p.name for p in tmp_path.glob("a.*")] == ["a.safetensors"]


def test_only_an_interrupted_training_can_be_finished(learn, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of an interrupted training"):
        learn("a", finish=True)
    assert not list(tmp_path.iterdir())


# ---- trained parameters


def test_a_seed_determines_the_identity(learn):
    first, again, other = learn("a"), learn("b"), learn("c", seed=1)
    assert same(first, again) and first.fingerprint == again.fingerprint
    assert not same(first, other)


def test_the_saved_identity_equals_the_returned_identity(learn, base, photos, tmp_path):
    made = learn("a")
    read = Identity.load(tmp_path / "a.safetensors")
    assert same(made, read) and read.metadata() == made.metadata()
    assert (read.base_fingerprint, read.method, read.layers) == (base.fingerprint, "pfstorer", base.config.layers)
    assert read.references == tuple(sha256_file(p) for p in photos)
    assert read.settings["train"]["iterations"] == 2
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o600


def test_one_step_moves_every_group_by_its_rate(learn, base):
    """Adam's first step is the rate of each parameter; fp16 keeps three digits."""
    one = learn("a", iterations=1)
    config = PersonalizeConfig(train=TrainConfig(iterations=1))
    for i in range(4):
        gamma = one.tensors[f"blocks.{i}.gamma"].float().abs()
        assert gamma.max().item() == pytest.approx(config.gamma_learning_rate, rel=0.01)
    start = base.text_encoder.word_embedding(tokenize(config.init_word, base.config))
    moved = (one.tensors["token"].float() - start).abs().max().item()
    assert moved == pytest.approx(config.token_learning_rate, rel=0.1)


def test_gamma_and_token_have_their_own_rates_and_no_weight_decay(base):
    config = replace(PersonalizeConfig(), gamma_learning_rate=0.25, token_learning_rate=0.5)
    objective = PersonalizationObjective(base, config)
    blocks, gammas, token = parameter_groups(objective, config)
    assert [g["lr"] for g in (blocks, gammas, token)] == [config.train.learning_rate, 0.25, 0.5]
    assert [g["weight_decay"] for g in (blocks, gammas, token)] == [config.train.weight_decay, 0.0, 0.0]
    assert {id(p) for p in gammas["params"]} == {id(b.gamma) for b in objective.blocks}
    assert len(token["params"]) == 1 and token["params"][0] is objective.token
    ours = {id(p) for group in (blocks, gammas, token) for p in group["params"]}
    assert ours == {id(p) for p in [*objective.blocks.parameters(), objective.token]}, "the base is frozen"


def test_training_pfstorer_changes_gamma(learn):
    made = learn("a", iterations=4)
    assert all(made.tensors[f"blocks.{i}.gamma"].abs().max() > 0 for i in range(4))
    assert set(made.gamma) == set(made.layers)
    assert all(0 < row["mean"] <= row["max"] for row in made.gamma.values())


def test_vico_keeps_gamma_at_one(learn):
    made = learn("a", "vico", iterations=4)
    assert all(bool((made.tensors[f"blocks.{i}.gamma"] == 1).all()) for i in range(4))


def test_training_changes_the_blocks(learn):
    few, more = learn("a", iterations=1), learn("b", iterations=5, learning_rate=1e-2)
    names = [k for k in few.tensors if k.startswith("blocks.") and not k.endswith(".gamma")]
    assert names and all(few.tensors[k].isfinite().all() for k in names)
    for i in range(4):  # gamma is zero at first, so the blocks move from the second step on
        assert any(not torch.equal(few.tensors[k], more.tensors[k]) for k in names if k.startswith(f"blocks.{i}."))


def test_dreambooth_trains_a_copy_of_the_unet(learn, base):
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    made = learn("a", "dreambooth", iterations=2, learning_rate=1e-2)
    assert made.layers == () and set(made.tensors) == {f"unet.{k}" for k in before}
    changed = [k for k, v in before.items() if not torch.equal(made.tensors[f"unet.{k}"], v.half())]
    assert len(changed) > len(before) / 2
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_personalizing_leaves_the_weights_of_the_base_unchanged(learn, base, method):
    from pfstorer_rt.models.base import fingerprint_modules

    learn("a", method, learning_rate=0.1)
    assert fingerprint_modules(base.modules()) == base.fingerprint


def test_bf16_training_works_on_a_cpu(learn):
    full, half = learn("a", iterations=3), learn("b", iterations=3, precision="bf16")
    assert all(t.isfinite().all() for t in half.tensors.values() if t.is_floating_point())
    assert not same(full, half)
    assert all(half.tensors[f"blocks.{i}.gamma"].abs().max() > 0 for i in range(4))


def test_fp16_on_a_cpu_is_refused_with_advice(learn, tmp_path):
    with pytest.raises(MissingBackendError, match="bf16"):
        learn("a", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_unreadable_photographs_alone_are_refused_before_training(base, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(BadFileError, match=r"bad\.png"):
        personalize("alice", [tmp_path / "bad.png"], base, None, tmp_path / "a.safetensors", on_progress=die)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.png"]


# ---- batches


def pool(base, photos, seed=0, **settings):
    config = PersonalizeConfig(train=TrainConfig(batch=3, seed=seed), pool=12)
    return make_pool([read_photo(p) for p in photos], base, replace(config, **settings))


def test_a_new_pool_starts_at_zero_and_counts_to_its_end(photos, nano_base):
    """A first report with finished samples would be shown as the work of an earlier run."""
    reports, config = [], PersonalizeConfig(train=TrainConfig(iterations=1, batch=2))
    make_pool([read_photo(photos[0])], nano_base, config, reports.append)
    assert [(report.stage, report.done, report.total) for report in reports] == [
        ("crops", 0, 2),
        ("crops", 2, 2),
    ]


def maker(pool, rank=0, processes=1, seed=0, **settings):
    """Function iteration -> batch of one of several processes."""
    batches = BatchMaker(pool, PersonalizeConfig(train=TrainConfig(batch=3, seed=seed), **settings))
    return lambda iteration: batches(iteration, iteration * processes + rank)


def test_a_pool_is_a_pure_function_of_its_seed(base, photos):
    one, same, other = pool(base, photos), pool(base, photos), pool(base, photos, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], same[:4], strict=True))
    assert one.images is one.maps is None
    assert one.hq.shape == one.lq.shape == (12, 4, 8, 8) and one.references.shape == (3, 4, 8, 8)
    assert not torch.equal(one.hq, other.hq) and not torch.equal(one.lq, other.lq)
    assert torch.bincount(one.photo).tolist() == [4, 4, 4]


def test_a_pool_contains_latents_of_clean_and_degraded_crops(base, photos):
    found = pool(base, photos, p_hq=1.0)  # nothing is degraded
    assert torch.equal(found.hq, found.lq)
    bad = pool(base, photos, p_hq=0.0)
    assert not any(torch.equal(a, b) for a, b in zip(bad.hq, bad.lq, strict=True))
    middle = center_crop(read_photo(photos[1]), 64)[None] * 2 - 1
    assert torch.allclose(found.references[1], base.encode(middle)[0], rtol=0, atol=1e-5)


def test_crops_are_reduced_up_to_the_largest_factor():
    rng = np.random.default_rng(0)
    factors = [reduced(LEVELS["heavy"], 8.0, rng).sf for _ in range(200)]
    assert 4 <= min(factors) < 4.3 and 7.7 < max(factors) <= 8
    state = rng.bit_generator.state
    assert reduced(LEVELS["heavy"], 4.0, rng) is LEVELS["heavy"]
    assert rng.bit_generator.state == state, "the crops of the paper's recipe keep their random numbers"


def test_a_larger_reduction_degrades_the_crops_of_a_pool_more(base, photos):
    mild, strong = (pool(base, photos, p_hq=0.0, largest_sf=largest) for largest in (4.0, 16.0))
    errors = [(each.hq - each.lq).square().mean() for each in (mild, strong)]
    assert errors[1] > errors[0]


def test_a_pool_contains_images_for_image_space_losses(base, photos):
    found = pool(base, photos, lambda_pixel=1.0)
    assert found.images.shape == (12, 2, 3, 64, 64) and np.isnan(found.maps).all(), "these show no face"
    batch = maker(found)(0)
    for name in ("hq", "lq"):  # the encoded images equal the latents
        again = base.encode(batch[f"{name}_image"])
        torch.testing.assert_close(again, batch[name], rtol=0, atol=0.1)
    assert batch["maps"].shape == (3, 2, 3) and batch["corner"].tolist() == [0, 0]
    assert not {"hq_image", "maps"} & set(maker(pool(base, photos))(0))


@pytest.mark.parametrize("method", METHODS)
def test_image_space_losses_have_gradients_in_the_trained_parameters(base, photos, method):
    config = PersonalizeConfig(
        method=method, train=TrainConfig(batch=3), pool=12, first_step=1.0, lambda_pixel=1.0, lambda_perceptual=1.0
    )
    looking = ImageSpaceLoss(base, config)
    kind = DreamBoothObjective if method == "dreambooth" else PersonalizationObjective
    batch = maker(pool(base, photos, lambda_pixel=1.0), first_step=1.0)(0)
    objective = kind(base, config, looking)
    losses = objective(batch)
    losses["pixel"].backward()
    gradients = [p.grad for p in objective.parameters() if p.requires_grad and p.grad is not None]
    assert gradients and any(g.abs().sum() > 0 for g in gradients)
    objective.image_loss = None
    seen = losses["pixel"] + losses["perceptual"]
    torch.testing.assert_close(losses["loss"] - objective(batch)["loss"], seen, atol=1e-3, rtol=0)
    objective.image_loss = looking
    batch["t"][:] = 500  # without a sample at timestep 999 there is no image-space loss
    assert objective(batch)["pixel"] == 0


def test_the_autoencoder_of_the_image_losses_has_the_precision_of_the_training(base, photos):
    """Otherwise autocast converts its weights at every iteration."""
    config = PersonalizeConfig(train=TrainConfig(batch=2), pool=4, first_step=1.0, lambda_pixel=1.0)
    objective = PersonalizationObjective(base, config, ImageSpaceLoss(base, config))
    batch, weights = maker(pool(base, photos, lambda_pixel=1.0), first_step=1.0)(0), base.vae.decoder.parameters()
    with torch.autocast("cpu", torch.bfloat16):
        converted = objective(batch)["pixel"].item()
        with frozen_weights_in(objective, torch.bfloat16):
            assert {w.dtype for w in weights if w.ndim == 4} == {torch.bfloat16}
            assert objective(batch)["pixel"].item() == pytest.approx(converted, rel=1e-3)
    assert {w.dtype for w in base.vae.parameters()} == {torch.float32}


def test_image_space_losses_are_disabled_without_the_metrics_extra(base, photos, tmp_path, without_dlib):
    train = TrainConfig(iterations=1, batch=1, device="cpu", precision="fp32")
    config, notes = PersonalizeConfig(train=train, lambda_id=1.0, first_step=1.0), []
    identity = personalize("a", photos, base, config, tmp_path / "a.safetensors", notes.append)
    assert identity.settings["lambda_id"] == 0 and any("without image-space losses" in note for note in notes)


def test_a_short_training_makes_only_the_needed_crops(base, photos):
    assert len(pool(base, photos, train=TrainConfig(iterations=2, batch=3)).hq) == 6


def test_batches_are_pure_functions_of_seed_and_iteration(base, photos):
    squares = pool(base, photos)
    a, b = maker(squares), maker(squares)
    b(5)
    first, again, next_one, other = a(2), b(2), a(3), maker(squares, seed=1)(2)
    assert first["hq"].shape == first["noise"].shape == (3, 4, 8, 8) and first["reference"].shape == (1, 4, 8, 8)
    assert all(torch.equal(first[k], again[k]) for k in first)
    for k in ("hq", "lq", "noise", "t"):
        assert not torch.equal(first[k], next_one[k]) and not torch.equal(first[k], other[k])


def test_processes_draw_other_samples_but_run_the_same_graph(base, photos):
    squares = pool(base, photos)
    ranks = [maker(squares, rank, 2, p_self=0.5) for rank in (0, 1)]
    for i in range(20):
        first, second = (r(i) for r in ranks)
        assert torch.equal(first["self"], second["self"]) and not torch.equal(first["noise"], second["noise"])


def test_the_reference_is_a_different_photograph_than_the_target(base, photos):
    squares = pool(base, photos)
    marked = squares._replace(
        hq=squares.photo.float()[:, None, None, None].expand(-1, 4, 8, 8),  # the number can be read from the latent
        references=torch.arange(3.0)[:, None, None, None].expand(-1, 4, 8, 8),
    )
    seen = set()
    for i in range(30):
        batch = maker(marked)(i)
        seen |= {(int(target), int(batch["reference"][0, 0, 0, 0])) for target in batch["hq"][:, 0, 0, 0]}
    assert seen == {(i, j) for i in range(3) for j in range(3) if i != j}
    alone = pool(base, photos[:1])
    assert torch.equal(maker(alone)(0)["reference"][0], alone.references[0])


@pytest.mark.parametrize(("settings", "share"), [({"p_self": 0.0}, 0), ({"ref_source": "self"}, 1)])
def test_p_self_is_the_share_of_batches_without_reference(base, photos, settings, share):
    batches = maker(pool(base, photos), **settings)
    assert {bool(batches(i)["self"]) for i in range(5)} == {bool(share)}


def test_first_step_is_the_share_of_samples_at_the_last_timestep(base, photos):
    made = pool(base, photos)
    plain, half = (maker(made, first_step=share) for share in (0.0, 0.5))
    pairs = [(a, b) for i in range(100) for a, b in zip(plain(i)["t"].tolist(), half(i)["t"].tolist(), strict=True)]
    moved = [b for a, b in pairs if a != b]
    assert set(moved) == {999} and 0.4 < len(moved) / len(pairs) < 0.6


# ---- launchers


def launch(launcher, base, photos, tmp_path):
    base.save(tmp_path / "base")
    words = ["personalize", "--identity", "bob", "--base", tmp_path / "base", "--iterations", 2, "--batch", 1]
    words += ["--precision", "fp32"]
    command = [*launcher, "-m", "pfstorer_rt", *words, *photos, "-o", tmp_path / "bob.safetensors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PFSTORER_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.crops"))
    return Identity.load(tmp_path / "bob.safetensors")


def test_accelerate_launches_one_process(base, photos, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    found = launch(launcher, base, photos, tmp_path)
    config = PersonalizeConfig(train=TrainConfig(iterations=2, batch=1, precision="fp32"))
    assert same(found, personalize("bob", photos, base, config, tmp_path / "here.safetensors"))


def test_two_processes_train_together(base, photos, tmp_path):
    found = launch(["-m", "torch.distributed.run", "--nproc-per-node", "2"], base, photos, tmp_path)
    assert all(t.isfinite().all() for t in found.tensors.values() if t.is_floating_point())
    assert all(found.tensors[f"blocks.{i}.gamma"].abs().max() > 0 for i in range(4))


# ---- a base's own defaults


def test_arguments_override_the_defaults_of_a_base():
    wants = {"learning_rate": 2e-3, "batch": 2, "lambda_gen": 0.0}
    config = replace(build_base("nano").config, personalize=wants)
    own = PersonalizeConfig.for_base(config)
    assert (own.train.learning_rate, own.train.batch, own.lambda_gen) == (2e-3, 2, 0.0)
    asked = PersonalizeConfig.for_base(config, {"batch": 1}, lambda_gen=1.0)
    assert (asked.train.learning_rate, asked.train.batch, asked.lambda_gen) == (2e-3, 1, 1.0)
    with pytest.raises(TypeError, match="learning_rat"):
        PersonalizeConfig.for_base(replace(config, personalize={"learning_rat": 1.0}))
