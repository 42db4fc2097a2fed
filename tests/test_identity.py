import json
import os
import stat
import struct

import pytest
import safetensors.torch
import torch

from pfstorer_rt.errors import BadFileError, MismatchError
from pfstorer_rt.identity import Identity, identities_dir, identity_path, list_identities, named_identity
from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.denoiser import Denoiser


@pytest.fixture
def saved(nano_identity, tmp_path):
    return nano_identity.save(tmp_path / "alice.safetensors")


def rewrite_header(path, **changes):
    """Change metadata strings in place, without the library."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    for key, value in changes.items():
        if value is None:
            header["__metadata__"].pop(key)
        else:
            header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_a_saved_identity_is_loaded_unchanged(nano_identity, saved):
    loaded = Identity.load(saved)
    assert loaded.tensors.keys() == nano_identity.tensors.keys()
    for name, tensor in nano_identity.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name
    assert loaded.metadata() == nano_identity.metadata()
    assert loaded.fingerprint == nano_identity.fingerprint
    assert loaded.layers == nano_identity.layers
    assert loaded.references == nano_identity.references
    assert loaded.gamma == nano_identity.gamma


def test_metadata_can_be_read_alone(nano_identity, saved):
    loaded = Identity.load(saved, tensors=False)
    assert loaded.tensors == {}
    assert loaded.metadata() == nano_identity.metadata()


def test_the_same_content_gives_the_same_bytes(nano_identity, saved, tmp_path):
    shuffled = Identity.load(saved)
    shuffled.tensors = dict(reversed(shuffled.tensors.items()))
    again = shuffled.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == saved.read_bytes()


def test_the_fingerprint_depends_only_on_the_tensors(nano_identity, saved):
    renamed = Identity.load(saved)
    renamed.name = "bob"
    assert renamed.fingerprint == nano_identity.fingerprint
    renamed.tensors["token"][0] += 0.5
    assert renamed.fingerprint != nano_identity.fingerprint


def test_only_the_owner_may_read_an_identity(nano_identity, saved, tmp_path):
    mask = os.umask(0)
    try:
        path = nano_identity.save(tmp_path / "folder" / "open.safetensors")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_an_identity_stores_hashes_and_no_pixels(nano_identity, saved):
    stored = safetensors.torch.load_file(saved)
    blocks = {f"blocks.{i}.gamma" for i in range(4)}
    cached = {f"{kind}.{i}" for i in range(4) for kind in ("reference", "mask")}
    assert blocks | cached | {"token"} <= stored.keys()
    assert all(name.startswith("blocks.") for name in stored.keys() - cached - {"token"})
    for i in range(4):
        assert stored[f"mask.{i}"].shape == stored[f"reference.{i}"].shape[:1]
    assert all(len(digest) == 64 for digest in nano_identity.references)
    for layer, figures in nano_identity.gamma.items():
        gamma = stored[f"blocks.{nano_identity.layers.index(layer)}.gamma"].double().abs()
        assert figures["max"] == pytest.approx(gamma.max().item(), abs=1e-5)
        assert figures["mean"] == pytest.approx(gamma.mean().item(), abs=1e-3)


def test_another_base_is_refused(nano_identity, nano_base):
    nano_identity.check_base(nano_base.fingerprint)
    other = build_base("nano", seed=9)
    with pytest.raises(MismatchError, match="was learned on base 'nano'") as caught:
        Denoiser(other, nano_identity)
    assert nano_base.fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def only_the_header(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: 8 + struct.unpack("<Q", raw[:8])[0]])


def other_safetensors(path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)


def newer(path):
    rewrite_header(path, schema="2")


def without_layers(path):
    rewrite_header(path, layers=None)


def broken_json(path):
    rewrite_header(path, settings="{")


UNREADABLE = r"not a readable safetensors file \(\d+ bytes\); damaged, cut off, or of another kind: copy it again"
DAMAGES = {
    empty: UNREADABLE,
    foreign: UNREADABLE,
    truncated: UNREADABLE,
    only_the_header: UNREADABLE,
    other_safetensors: "but not an identity",
    newer: "identity schema 2, this version reads 1",
    without_layers: "metadata are incomplete",
    broken_json: "metadata are incomplete",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("tensors", [True, False])
def test_damaged_files_are_refused(saved, damage, tensors):
    damage(saved)
    with pytest.raises(BadFileError, match=DAMAGES[damage]) as caught:
        Identity.load(saved, tensors)
    assert str(caught.value).startswith(str(saved))
    assert "\n" not in str(caught.value)


REMOVED = {
    "tap": ("post", "inner"),
    "residual": ("delta", "full"),
    "ref_sft": ("self", "bypass"),
    "ref_timestep": ("0", "same"),
    "main_prompt": ("null", "subject"),
    "null_cond": ("zero_latent", "bypass"),
}
"""Settings of earlier versions: the value that is still supported, and one that is not."""


def test_identities_of_earlier_versions_are_loaded(nano_identity, saved, nano_base):
    earlier = nano_identity.settings | {name: kept for name, (kept, _) in REMOVED.items()}
    assert earlier.keys() > nano_identity.settings.keys()
    rewrite_header(saved, settings=json.dumps(earlier))
    assert len(Denoiser(nano_base, Identity.load(saved)).blocks) == 4


@pytest.mark.parametrize(
    ("name", "value"), [*((name, gone) for name, (_, gone) in REMOVED.items()), ("ref_source", "live")]
)
def test_identities_trained_with_a_removed_setting_are_refused(nano_identity, saved, name, value):
    rewrite_header(saved, settings=json.dumps(nano_identity.settings | {name: value}))
    expected = rf"it was trained with {name}='{value}', and this version supports only .*personalize again"
    with pytest.raises(BadFileError, match=expected):
        Identity.load(saved)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(BadFileError, match="no such identity"):
            Identity.load(path)


def test_names_lead_into_the_identities_folder(private_home):
    assert identities_dir() == private_home / "identities"
    for name in ("alice", "Bob-2", "a.b_c", "0", "x" * 64):
        assert identity_path(name) == named_identity(name) == private_home / "identities" / f"{name}.safetensors"


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "a/b", "/etc/x", "a\\b", "-rf", ".hidden", "a b", "x" * 65, "ä", "a\n", "a\0"]
)
def test_other_names_cannot_leave_the_folder(name):
    with pytest.raises(ValueError, match="expected letters a-z or A-Z, digits"):
        named_identity(name)


def test_a_name_is_not_a_file():
    with pytest.raises(ValueError, match=r"without \.safetensors"):
        named_identity("alice.safetensors")


def test_a_path_is_used_unchanged(tmp_path):
    for path in (tmp_path / "a.safetensors", "b.safetensors", "../c.safetensors"):
        assert str(identity_path(path)) == str(path)


def test_a_training_with_a_path_as_name_is_refused(nano_base, tmp_path, monkeypatch):
    from PIL import Image

    from pfstorer_rt.training.personalize import personalize

    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), "red").save(photo)
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(ValueError, match="identity name"):
        personalize("../escaped", [photo], nano_base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside", "photo.png"]


def test_the_list_is_sorted_and_contains_only_identities(nano_identity, tmp_path, monkeypatch):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "other"))
    assert list_identities() == []
    for name in ("bob", "alice"):
        nano_identity.save(identity_path(name))
    (identities_dir() / "alice.training.pt").write_bytes(b"")
    assert [p.stem for p in list_identities()] == ["alice", "bob"]


def test_two_iterations_make_an_identity(nano_base, make_image, tmp_path):
    import numpy as np
    from PIL import Image

    from pfstorer_rt.config import PersonalizeConfig, TrainConfig
    from pfstorer_rt.files import sha256_file
    from pfstorer_rt.training.personalize import personalize

    paths = [tmp_path / f"{k}.png" for k in range(2)]
    for k, path in enumerate(paths):
        Image.fromarray((make_image(90, 70, k) * 255).astype(np.uint8)).save(path)
    config = PersonalizeConfig(train=TrainConfig(iterations=2, batch=1, device="cpu"))
    made = personalize("carol", paths, nano_base, config)
    file = identity_path("carol")
    assert file.is_file()
    assert not file.with_name("carol.training.pt").exists()
    loaded = Identity.load(file)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.references == tuple(sha256_file(path) for path in paths)
    # Adam moves gamma by about its rate, 5e-3, at each of two iterations.
    largest = max(figures["max"] for figures in loaded.gamma.values())
    assert 4e-3 < largest < 1.2e-2
    repeated = personalize("carol", paths, nano_base, config, tmp_path / "again.safetensors")
    assert repeated.fingerprint == made.fingerprint
    file.unlink()


def test_a_flipped_byte_in_the_tensors_is_refused(nano_identity, tmp_path):
    path = nano_identity.save(tmp_path / "one.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFileError, match="fingerprint"):
        Identity.load(path)


@pytest.mark.parametrize("field", ["fingerprint", "base_fingerprint"])
@pytest.mark.parametrize("value", ["/srv/photos", "..", "", "0" * 63, "F" * 64, "../" * 21 + "a", None])
def test_a_fingerprint_is_64_hexadecimal_digits(saved, field, value):
    rewrite_header(saved, **{field: value})
    for tensors in (True, False):
        with pytest.raises(BadFileError, match=r"64 hexadecimal digits|metadata are incomplete"):
            Identity.load(saved, tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../alice"},
        {"name": "a\nb"},
        {"base_name": "/srv/base"},
        {"method": "os"},
        {"layers": '["unet.__class__"]'},
        {"layers": "[7]"},
        {"layers": '["up_blocks.1.attentions.0.norm"]'},
        {"references": '["photo.jpg"]'},
    ],
)
def test_invalid_names_in_a_file_are_refused(saved, change):
    rewrite_header(saved, **change)
    with pytest.raises(BadFileError, match="metadata are incomplete or wrong"):
        Identity.load(saved)
