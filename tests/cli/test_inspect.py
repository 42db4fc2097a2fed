"""`inspect`."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pfstorer_rt.models.base import load_base
from pfstorer_rt.models.prior import Prior


def test_inspect_shows_a_base(run, nano_base_dir, nano_base):
    report = json.loads(run("inspect", nano_base_dir, "--json").out)
    assert report["type"] == "base" and report["fingerprint"] == nano_base.fingerprint
    assert report["config"]["name"] == "nano"
    assert report["parameters"]["unet"] == sum(p.numel() for p in nano_base.unet.parameters())
    assert report["bytes"] == sum(path.stat().st_size for path in nano_base_dir.rglob("*.*"))
    assert report["personalization"]["train"]["iterations"] == 500, "nano has the defaults of the paper"
    assert f"fingerprint: {nano_base.fingerprint}" in run("inspect", nano_base_dir, "--verbose").out
    words = dict(line.split(":", 1) for line in run("inspect", nano_base_dir).out.splitlines())
    assert {name: text.strip() for name, text in words.items() if name != "parameters"} == {
        "base": "nano",
        "folder": str(nano_base_dir),
        "licence": "none",
        "size on disk": f"{report['bytes'] / 1e6:.1f} MB",
        "tile": "64 x 64 pixels, in latent space 8 x 8 (factor 8)",
        "sampler": "ddpm, steps: 4",
        "personalization": "500 iterations of 4 samples, learning rate 5e-05, after 4 attention layers",
        "loss weights": "L_diff 1, L_gen 0.1, L_pers 0.0005",
        "prior": "none",
        "fingerprint": nano_base.fingerprint,
    }


def test_inspect_names_the_kind_of_a_prior(run, nano_base, tmp_path):
    for instant, text in ((False, "start of the training of a person"), (True, "learns a person without training")):
        base = replace(nano_base.copy(), prior=Prior(nano_base.unet, nano_base.config, instant))
        folder = base.save(tmp_path / f"{instant}")
        assert load_base(folder).instant is instant
        assert f"prior: {text}" in " ".join(run("inspect", folder).out.split())


def test_inspect_shows_an_identity_by_file_and_by_name(run, people, nano_identity):
    by_file = json.loads(run("inspect", people / "alice.safetensors", "--json").out)
    assert by_file == json.loads(run("inspect", "alice", "--json").out)
    assert by_file["type"] == "identity" and by_file["fingerprint"] == nano_identity.fingerprint
    assert by_file["tensors"]["token"] == ["float16", *nano_identity.tensors["token"].shape]
    text = run("inspect", "alice", "--verbose").out
    assert "method: pfstorer" in text and f"tensors: {len(nano_identity.tensors)}" in text
    text = run("inspect", "alice").out
    assert text == run("identities", "show", "alice").out
    assert "photographs: 1\n" in text and "4 layers" in text


def test_inspect_shows_a_plan(run, nano_plan):
    report = json.loads(run("inspect", nano_plan.path, "--json").out)
    assert report["type"] == "plan" and report["identity_name"] == "alice"
    sizes = {name: payload["bytes"] for name, payload in report["payloads"].items()}
    assert sizes == {name: len(nano_plan.read(name)) for name in ("encoder", "denoiser", "decoder")}
    assert "identity_name: alice" in run("inspect", nano_plan.path, "--verbose").out
    lines = run("inspect", nano_plan.path).out.splitlines()
    assert len(lines) == 12 and "identity:      alice (method pfstorer)" in lines, "a summary"
    assert "strength:      adjustable" in lines
    assert "trusted:       yes: it contains no code" in lines


def test_inspect_shows_no_strength_of_a_plan_without_an_identity(run, nano_base, tmp_path):
    from pfstorer_rt.export import export_plan

    export_plan(tmp_path / "base.plan", None, nano_base)
    lines = run("inspect", tmp_path / "base.plan").out.splitlines()
    assert "identity:      none" in lines and not any(line.startswith("strength") for line in lines)


def cut_plan(path, plan, base):
    path.write_bytes(plan.path.read_bytes()[:-100])


def changed_plan(path, plan, base):
    data = bytearray(plan.path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def base_without_unet(path, plan, base):
    import shutil

    shutil.copytree(base, path)
    shutil.rmtree(path / "unet")


def base_with_cut_weights(path, plan, base):
    import shutil

    shutil.copytree(base, path)
    weights = next((path / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("missing", lambda path, plan, base: None),
        ("empty.plan", lambda path, plan, base: path.write_bytes(b"")),
        ("text", lambda path, plan, base: path.write_text("{}")),
        ("cut.plan", cut_plan),
        ("changed.plan", changed_plan),
        ("folder", lambda path, plan, base: path.mkdir()),
        ("no-unet", base_without_unet),
        ("cut-weights", base_with_cut_weights),
        ("missing.safetensors", lambda path, plan, base: None),
        ("text.safetensors", lambda path, plan, base: path.write_text("{}")),
        ("other.safetensors", lambda path, plan, base: safetensors_file(path)),
        ("cut.safetensors", lambda path, plan, base: safetensors_file(path, cut=4)),
    ],
)
def test_inspect_refuses_damaged_files_in_one_line(refused, tmp_path, nano_plan, nano_base_dir, name, make):
    make(tmp_path / name, nano_plan, nano_base_dir)
    refused(2, "inspect", tmp_path / name, "--json", words=[name])


def safetensors_file(path, cut=0):
    import safetensors.numpy

    data = safetensors.numpy.save({"x": np.zeros(8, np.float32)})
    path.write_bytes(data[: len(data) - cut])


def test_terminal_escapes_in_files_are_printed_as_text(run, refused, people, tmp_path):
    import safetensors.numpy
    from safetensors import safe_open

    source = people / "alice.safetensors"
    with safe_open(source, "np") as handle:
        meta = handle.metadata()
    clear = "\x1b[2J"
    meta["gamma"] = json.dumps({clear: clear})
    gift = tmp_path / "gift.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(source), gift, meta)
    done = run("inspect", gift)  # these values are refused, and the message quotes them
    assert done.status == 2 and "\x1b" not in done.out + done.err and r"\x1b[2J" in done.err
    assert r"\x1b[2J" in refused(2, "inspect", f"{clear}.safetensors")
