"""Hostile identity files: each is refused in one line, and a foreign file before any slow import."""

import json
import os
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from pfstorer_rt.errors import BadFileError, MismatchError
from pfstorer_rt.files import fingerprint_tensors
from pfstorer_rt.identity import Identity
from pfstorer_rt.runtime.restorer import Restorer

LAYERS = ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]


def tensors():
    found = {"token": torch.zeros(8).half()}
    for i in range(2):
        found |= {f"blocks.{i}.gamma": torch.zeros(4).half(), f"blocks.{i}.block.ff.weight": torch.zeros(4, 4).half()}
        found |= {f"reference.{i}": torch.zeros(6, 4).half(), f"mask.{i}": torch.ones(6, dtype=torch.bool)}
    return found


def metadata(values):
    return {
        "kind": "pfstorer-identity",
        "schema": "1",
        "name": "alice",
        "base_fingerprint": "0" * 64,
        "base_name": "nano",
        "method": "pfstorer",
        "layers": json.dumps(LAYERS),
        "settings": json.dumps({"rank": 0, "ref_source": "cached", "subject_prompt": "a photo of a {}"}),
        "references": json.dumps(["1" * 64]),
        "gamma": json.dumps({LAYERS[0]: {"mean": 0.1, "max": 0.2}}),
        "fingerprint": fingerprint_tensors(sorted(values.items())),
    }


@pytest.fixture
def write(tmp_path):
    """Function (tensors, **metadata) -> path of an identity file with its own right fingerprint."""

    def call(values, **changes):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(values, path, {**metadata(values), **changes})
        return path

    return call


@pytest.fixture
def refused(write):
    def call(values=None, loaded=True, **changes):
        path = write(tensors() if values is None else values, **changes)
        with pytest.raises(BadFileError) as caught:
            Identity.load(path, loaded)
        text = str(caught.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 600
        return text

    return call


def test_a_trained_identity_is_loaded(write):
    assert Identity.load(write(tensors())).layers == tuple(LAYERS)
    dreambooth = {"unet.conv_in.weight": torch.zeros(2, 2).half()}
    assert Identity.load(write(dreambooth, method="dreambooth", layers="[]")).tensors.keys() == dreambooth.keys()


CHANGES = {
    "no tensors": lambda t: t.clear(),
    "no gamma": lambda t: t.pop("blocks.1.gamma"),
    "no token": lambda t: t.pop("token"),
    "no reference": lambda t: t.pop("reference.0"),
    "no mask": lambda t: t.pop("mask.1"),
    "NaN": lambda t: t["blocks.0.block.ff.weight"].fill_(float("nan")),
    "infinite": lambda t: t["token"].fill_(float("inf")),
    "integers": lambda t: t.update({"blocks.0.gamma": torch.zeros(4, dtype=torch.int64)}),
    "fp64": lambda t: t.update({"token": torch.zeros(8, dtype=torch.float64)}),
    "mask of numbers": lambda t: t.update({"mask.0": torch.ones(6).half()}),
    "mask of another length": lambda t: t.update({"mask.0": torch.ones(5, dtype=torch.bool)}),
    "mask without a token": lambda t: t["mask.0"].fill_(False),
    "shape": lambda t: t.update({"reference.1": torch.zeros(6).half()}),
    "empty": lambda t: t.update({"token": torch.zeros(0).half()}),
    "another block": lambda t: t.update({"blocks.2.gamma": torch.zeros(4).half()}),
    "another name": lambda t: t.update({"__reduce__": torch.zeros(4).half()}),
    "a unet": lambda t: t.update({"unet.conv_in.weight": torch.zeros(4).half()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_unknown_tensors_of_an_identity_are_refused(refused, change):
    values = tensors()
    CHANGES[change](values)
    assert "tensor" in refused(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "evil"),
        ("method", "dreambooth"),
        ("layers", "null"),
        ("layers", "[]"),
        ("layers", json.dumps(LAYERS[:1] * 2)),
        ("layers", "[" * 100_000),
        ("layers", json.dumps([f"up_blocks.{i}.attentions.{j}" for i in range(30) for j in range(30)])),
        ("layers", '"up_blocks.1.attentions.0"'),
        ("settings", "[]"),
        ("settings", '{"rank": -1}'),
        ("settings", '{"rank": 1000000000}'),
        ("settings", '{"rank": NaN}'),
        ("settings", '{"train": {"clip": 1e999}}'),
        ("gamma", '{"a": {"max": 1%s}}' % ("0" * 400)),
        ("settings", '{"rank": "0"}'),
        ("settings", '{"subject_prompt": 7}'),
        ("settings", '{"subject_prompt": "\\ud800 {}"}'),
        ("references", "{}"),
        ("references", "[]"),
        ("references", "[null]"),
        ("gamma", "[]"),
        ("gamma", '{"a": {"max": Infinity}}'),
        ("gamma", '{"a": 1}'),
        ("schema", "9" * 10_000),
        ("name", "\x1b[2Jalice"),
    ],
)
@pytest.mark.parametrize("loaded", [True, False])
def test_invalid_metadata_of_an_identity_are_refused(refused, key, value, loaded):
    refused(None, loaded, **{key: value})


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 24) + b'{"__metadata__":[1,2,3]}',
        struct.pack("<Q", 26) + b'{"__metadata__":{"kind":1}}',
        b"PK\3\4",
    ],
    ids=["huge header", "no header", "nested", "null", "list", "number", "zip"],
)
def test_a_header_of_another_form_is_refused(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(BadFileError, match="not a readable safetensors file"):
        Identity.load(tmp_path / "a.safetensors")


def test_a_pipe_and_a_link_loop_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("pipe", "loop"):
        with pytest.raises(BadFileError, match="no such identity"):
            Identity.load(tmp_path / f"{name}.safetensors")


def test_a_foreign_file_is_refused_before_the_networks_are_imported(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300))
    code = (
        "import sys\nfrom pfstorer_rt.errors import BadFileError\nfrom pfstorer_rt.runtime.restorer import Restorer\n"
        f"try: Restorer.from_base('tiny', {str(tmp_path / 'a.safetensors')!r})\n"
        "except BadFileError: sys.exit('diffusers' in sys.modules)\nsys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ESCAPES = "\n\x1b[2J"


def test_line_breaks_and_terminal_escapes_in_metadata_are_not_printed(refused):
    for changes in ({"schema": ESCAPES}, {"gamma": json.dumps({LAYERS[0]: {ESCAPES: "x"}})}, {"name": ESCAPES}):
        assert ESCAPES not in refused(**changes)


def test_a_long_setting_is_not_printed_in_full(refused):
    assert "ref_source='xxx" in refused(settings=json.dumps({"ref_source": "x" * 5000}))


WRONG = {
    "another rank": lambda identity: identity.settings.update(rank=3),
    "fewer weights": lambda identity: identity.tensors.pop("blocks.0.block.ff.net.0.proj.weight"),
    "another width": lambda identity: identity.tensors.update({"blocks.1.gamma": torch.zeros(3).half()}),
    "another reference": lambda identity: identity.tensors.update({"reference.1": torch.zeros(64, 3).half()}),
    "more weights": lambda identity: identity.tensors.update({"blocks.0.x\x1b": torch.zeros(3).half()}),
}


@pytest.mark.parametrize("change", WRONG)
def test_tensors_of_other_networks_are_refused_when_an_identity_is_used(
    nano_base, make_nano_identity, tmp_path, change
):
    identity = make_nano_identity()
    WRONG[change](identity)
    if "reference.1" in identity.tensors:
        identity.tensors["mask.1"] = torch.ones(len(identity.tensors["reference.1"]), dtype=torch.bool)
    loaded = Identity.load(identity.save(tmp_path / "a.safetensors"))
    with pytest.raises(MismatchError, match="identity 'alice' does not fit its base") as caught:
        Restorer.from_base(nano_base, loaded, device="cpu")
    assert len(str(caught.value)) < 300


def test_an_identity_without_settings_is_used_with_the_defaults(nano_base, make_nano_identity, tmp_path):
    identity = make_nano_identity()
    identity.settings = {}
    loaded = Identity.load(identity.save(tmp_path / "a.safetensors"))
    with Restorer.from_base(nano_base, loaded, device="cpu"):
        pass
