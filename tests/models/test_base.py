import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from pfstorer_rt.base_files import BUILTIN, find_base, fingerprint_directory, shipped_bases
from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.diffusion import Schedule
from pfstorer_rt.errors import BadFileError, PFStorerError
from pfstorer_rt.models.base import build_base, fingerprint_modules, load_base
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.objectives import RestorerObjective

NETWORKS = ("unet", "structure_encoder", "vae", "text_encoder")


@pytest.fixture
def copied(nano_base_dir, tmp_path):
    """A copy of the base directory that a test may damage."""
    return shutil.copytree(nano_base_dir, tmp_path / "copy")


def weights_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def test_a_saved_base_is_loaded_unchanged(nano_base, nano_base_dir):
    loaded = load_base(nano_base_dir)
    assert loaded.config == nano_base.config
    assert loaded.path == nano_base_dir
    for name, module in nano_base.modules().items():
        found = loaded.modules()[name].state_dict()
        expected = module.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected), name
        assert not any(p.requires_grad for p in loaded.modules()[name].parameters())
        assert not loaded.modules()[name].training


def test_fingerprint_is_the_hash_of_the_tensors_on_disk(nano_base, nano_base_dir):
    digest = hashlib.sha256()
    for name in sorted(NETWORKS):
        tensors = safetensors.torch.load_file(weights_file(nano_base_dir / name))
        for key in sorted(tensors):
            raw = tensors[key].numpy().tobytes()
            digest.update(f"{name}.{key}".encode() + b"\0" + str(tensors[key].dtype).encode() + b"\0" + raw)
    assert load_base(nano_base_dir).fingerprint == digest.hexdigest()
    assert nano_base.fingerprint == fingerprint_modules(nano_base.modules()) == digest.hexdigest()


def test_saving_in_fp16_rounds_memory_and_disk_equally(tmp_path):
    base = build_base("nano", seed=3)
    before = base.fingerprint
    base.save(tmp_path / "half", torch.float16)
    loaded = load_base(tmp_path / "half")
    assert base.fingerprint == loaded.fingerprint != before
    weight = weights_file(tmp_path / "half" / "unet")
    assert {t.dtype for t in safetensors.torch.load_file(weight).values()} == {torch.float16}
    for name, module in base.modules().items():
        found = loaded.modules()[name].state_dict()
        assert all(torch.equal(found[k], v) for k, v in module.state_dict().items()), name
        assert next(module.parameters()).dtype == torch.float32


def test_saving_twice_gives_the_same_bytes(nano_base_dir, tmp_path):
    again = load_base(nano_base_dir).save(tmp_path / "again")
    files = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(nano_base_dir) for p in nano_base_dir.rglob("*") if p.is_file())
    for file in files:
        assert (again / file).read_bytes() == (nano_base_dir / file).read_bytes(), file


def test_a_seed_determines_the_base():
    state = torch.random.get_rng_state()
    first, same, other = build_base("nano", 1), build_base("nano", 1), build_base("nano", 2)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shards_and_variants_of_the_hub_are_one_network(copied, nano_base):
    folder = copied / "unet"
    stem = "diffusion_pytorch_model"
    tensors = safetensors.torch.load_file(folder / f"{stem}.safetensors")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = {k: tensors[k] for k in part}
        safetensors.torch.save_file(shard, folder / f"{stem}-{i:05}-of-00002.safetensors")
    zeros = {k: v * 0 for k, v in tensors.items()}
    safetensors.torch.save_file(zeros, folder / f"{stem}.fp16.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    assert load_base(copied).fingerprint == nano_base.fingerprint
    assert all(torch.equal(v, nano_base.unet.state_dict()[k]) for k, v in load_base(copied).unet.state_dict().items())


def test_one_changed_weight_changes_the_fingerprint(copied):
    before = fingerprint_directory(copied)
    file = weights_file(copied / "vae")
    tensors = safetensors.torch.load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    safetensors.torch.save_file(tensors, file)
    assert fingerprint_directory(copied) != before


def test_the_directory_has_diffusers_layout(nano_base, nano_base_dir):
    config = UNet2DConditionModel.load_config(nano_base_dir / "unet")
    assert tuple(config["block_out_channels"]) == (8, 16, 16, 16)
    scheduler = DDPMScheduler.from_pretrained(nano_base_dir / "scheduler")
    # diffusers computes it in fp32.
    expected = nano_base.schedule.alphas_cumprod_tensor()
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=2e-5, atol=0)
    assert scheduler.config.prediction_type == nano_base.config.prediction_type


def test_encode_and_decode_sizes(nano_base):
    image = torch.zeros(2, 3, 64, 32)
    with torch.no_grad():
        latent = nano_base.encode(image)
        assert latent.shape == (2, 4, 8, 4)
        assert nano_base.decode(latent).shape == image.shape
        # A deterministic encoder has nothing to draw.
        assert torch.equal(nano_base.encode(image, torch.Generator().manual_seed(0)), latent)


def test_prompts_are_encoded_with_the_learned_token(nano_base):
    with torch.no_grad():
        empty, face = nano_base.encode_prompt(), nano_base.encode_prompt("a photo of a face")
        assert empty.shape == (1, 24, 32)
        assert not torch.equal(empty, face)
        first, second = (nano_base.encode_prompt("a photo of a S*", torch.full((32,), v)) for v in (0.1, -0.3))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="needs a learned token"):
        nano_base.encode_prompt("a photo of a S*")
    with pytest.raises(ValueError, match="at most 24"):
        nano_base.encode_prompt("face " * 20)


def test_bases_are_found_by_path_and_by_shipped_name(nano_base_dir, tmp_path):
    assert find_base(nano_base_dir) == nano_base_dir
    assert find_base(str(nano_base_dir)) == nano_base_dir
    names = shipped_bases()
    assert names and all(find_base(name) == BUILTIN / name for name in names)
    with pytest.raises(BadFileError, match=rf"shipped base \({', '.join(names)}\)"):
        find_base("no-such-base")
    for wrong in (tmp_path, nano_base_dir / "config.json", tmp_path / "missing"):
        with pytest.raises(BadFileError, match=r"expected a base directory"):
            find_base(wrong)


@pytest.mark.parametrize(
    "part, key", [("text", "attn_implementation"), ("text", "_attn_implementation"), ("unet", "x"), ("vae", "x")]
)
def test_a_base_cannot_name_code_to_run(copied, part, key):
    """transformers fetches and runs an attention that is named as a repository."""
    config = json.loads((copied / "config.json").read_text())
    config[part][key] = "somebody/kernels"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFileError, match=rf"{part} has unknown arguments \['{key}'\]"):
        load_base(copied)


def test_the_autoencoder_of_feature_wrapping_cannot_name_code_to_run(copied):
    config = json.loads((copied / "config.json").read_text())
    config["cfw"] = {"vae": {"class": "AutoencoderKL", "quantization_config": {}}}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFileError, match="cfw vae quantization_config"):
        load_base(copied)


def test_a_base_without_a_noise_schedule_is_not_looked_up_on_the_hub(copied, monkeypatch):
    """diffusers reads `copy/scheduler` as the name of a repository where there is no such folder."""
    asked = []
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", lambda *names, **more: asked.append(names))
    monkeypatch.chdir(copied.parent)
    shutil.rmtree(copied / "scheduler")
    with pytest.raises(BadFileError, match=r"scheduler_config.json is missing"):
        load_base(copied.name)
    assert asked == []


def test_a_base_with_a_path_as_name_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "name": "../x"}))
    with pytest.raises(BadFileError, match=r"name '\.\./x', expected letters"):
        load_base(copied)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="expected one of nano, tiny, portrait, sd21"):
        build_base("huge")


def empty_weights(folder):
    weights_file(folder / "unet").write_bytes(b"")


def short_weights(folder):
    file = weights_file(folder / "vae")
    file.write_bytes(file.read_bytes()[:-100])


def foreign_weights(folder):
    weights_file(folder / "structure_encoder").write_bytes(b"PK\x03\x04" + bytes(500))


def no_weights(folder):
    weights_file(folder / "text_encoder").unlink()


def lacking_tensor(folder):
    file = weights_file(folder / "unet")
    tensors = safetensors.torch.load_file(file)
    del tensors["conv_in.weight"]
    safetensors.torch.save_file(tensors, file)


def empty_config(folder):
    (folder / "config.json").write_bytes(b"")


def unknown_field(folder):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "depth": 3}))


def no_scheduler(folder):
    shutil.rmtree(folder / "scheduler")


DAMAGES = (
    empty_weights,
    short_weights,
    foreign_weights,
    no_weights,
    lacking_tensor,
    empty_config,
    unknown_field,
    no_scheduler,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_bases_are_refused(copied, damage):
    damage(copied)
    with pytest.raises(BadFileError, match="not a usable base directory") as caught:
        load_base(copied)
    assert "\n" not in str(caught.value)
    assert "import or train it again" in str(caught.value)


@pytest.fixture
def third_write_fails(monkeypatch):
    """Writing the third network fails with the exception `.error`."""
    real, state = safetensors.torch.save_file, SimpleNamespace(error=None, count=0)

    def save_file(tensors, file, metadata):
        state.count += 1
        if state.count == 3:
            file.write_bytes(b"a part")
            raise state.error
        real(tensors, file, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    return state


FAILURES = {KeyboardInterrupt(): KeyboardInterrupt, OSError(28, "No space left on device"): PFStorerError}


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_failed_save_leaves_the_old_base(copied, nano_base_dir, tmp_path, third_write_fails, error):
    before = {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()}
    base, third_write_fails.error = load_base(nano_base_dir), error
    with torch.no_grad():
        base.unet.conv_in.bias += 1
    for folder in (copied, tmp_path / "new"):
        third_write_fails.count = 0
        with pytest.raises(FAILURES[error]) as caught:
            base.save(folder)
        assert ".pfstorer" not in str(caught.value)
    assert {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()} == before
    assert sorted(f.name for f in copied.iterdir()) == sorted(f.name for f in nano_base_dir.iterdir())
    assert not (tmp_path / "new").exists()


def test_a_save_replaces_the_base_and_nothing_else(copied, nano_base_dir):
    base = load_base(nano_base_dir)
    (copied / "README.md").write_text("mine")
    for stray in ("cfw", "unet"):  # of a base that had more
        (copied / stray).mkdir(exist_ok=True)
        shutil.copy(weights_file(copied / "vae"), copied / stray / "other.safetensors")
    base.save(copied, torch.float16)
    assert load_base(copied).fingerprint == base.fingerprint != load_base(nano_base_dir).fingerprint
    assert (copied / "README.md").read_text() == "mine" and not (copied / "cfw").exists()


def test_too_little_disk_space_is_reported_before_a_base_is_written(copied, set_free_space):
    base = load_base(copied)
    before = {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()}
    size = sum(t.numel() * 2 for m in base.modules().values() for t in m.state_dict().values())
    set_free_space(size - 1)
    with pytest.raises(PFStorerError, match="are needed"):
        base.save(copied, torch.float16)
    assert {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()} == before


def test_a_copy_shares_the_weights_but_neither_types_nor_kernels(nano_base):
    names, kernels = nano_base.modules(), nano_base.unet.kernels
    before = {name: [t.data_ptr() for t in module.parameters()] for name, module in names.items()}
    copy = nano_base.copy()
    assert {name: [t.data_ptr() for t in module.parameters()] for name, module in copy.modules().items()} == before
    copy.to("cpu", torch.float16).set_attention("math")
    copy.vae.train()
    assert {name: [t.data_ptr() for t in module.parameters()] for name, module in names.items()} == before
    assert all(t.dtype == torch.float32 for module in names.values() for t in module.parameters())
    assert nano_base.unet.kernels is kernels and not nano_base.vae.training
    assert copy.fingerprint == nano_base.fingerprint


def test_a_base_restores_with_its_own_schedule(nano_base, tmp_path, make_image):
    schedule = Schedule(beta_end=0.03)
    replace(nano_base, schedule=schedule).save(tmp_path / "other")
    loaded = load_base(tmp_path / "other")
    assert loaded.schedule == schedule
    results = []
    for base in (nano_base, loaded):
        with Restorer.from_base(base, device="cpu") as restorer:
            assert restorer.manifest.schedule == base.schedule
            results.append(restorer.restore(make_image(64, 64), RestoreConfig(steps=2, color_fix="none")))
    assert np.abs(results[0] - results[1]).max() > 0.01
    # Training uses the same numbers.
    objective = RestorerObjective(loaded)
    np.testing.assert_allclose(objective.alphas_cumprod.numpy(), schedule.alphas_cumprod(), rtol=1e-6)


def test_a_base_with_an_unknown_schedule_is_refused(nano_base_dir, tmp_path):
    shutil.copytree(nano_base_dir, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("scaled_linear", "squaredcos_cap_v2"))
    with pytest.raises(BadFileError, match="'squaredcos_cap_v2' of 1000 steps: expected 'scaled_linear'"):
        load_base(tmp_path / "other")
