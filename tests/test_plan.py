import json
import os
import stat
import zipfile
from dataclasses import replace

import pytest
from small_plan import field, small_manifest, small_payloads

from pfstorer_rt.diffusion import Schedule
from pfstorer_rt.errors import BadFileError, Rebuild
from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.plan import COMPONENTS, SCHEMA, SIGNATURE, Manifest, Plan, move_plan, write_plan

PRODUCER = 2
"""Field of an ONNX model for free text."""
_TEXTS = {"encoder": b"first" * 100, "denoiser": bytes(range(256)) * 40, "decoder": b"last"}
PAYLOADS = {name: field(PRODUCER, _TEXTS[name]) + graph for name, graph in small_payloads().items()}


def make_manifest(**changes):
    return small_manifest(PAYLOADS, **changes)


@pytest.fixture
def plan(tmp_path):
    return write_plan(tmp_path / "a.plan", make_manifest(), PAYLOADS)


def rewrite(path, change_manifest=lambda data: data, without=()):
    """Write the zip again with another manifest and valid CRCs."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["manifest.json"] = json.dumps(change_manifest(json.loads(parts["manifest.json"]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            if name not in without:
                archive.writestr(name, data)


def test_a_written_plan_is_read_unchanged(plan):
    opened = Plan.open(plan.path)
    assert opened.manifest == make_manifest()
    assert {c: opened.read(c) for c in COMPONENTS} == PAYLOADS
    assert Manifest.from_dict(json.loads(opened.manifest.to_json())) == opened.manifest


def test_a_plan_contains_the_noise_schedule(tmp_path):
    other = make_manifest(schedule=Schedule(beta_end=0.02))
    assert write_plan(tmp_path / "a.plan", other, PAYLOADS).manifest.schedule == Schedule(beta_end=0.02)
    assert json.loads(other.to_json())["schedule"]["kind"] == "scaled_linear"
    data = json.loads(make_manifest().to_json())
    del data["schedule"]  # a plan of an earlier version has StableSR's
    assert Manifest.from_dict(data).schedule == Schedule(beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize("change", [{"kind": "squaredcos_cap_v2"}, {"steps": 4000}, {"beta_end": "x"}, {"rule": 1}])
def test_a_plan_with_an_unknown_schedule_is_refused(plan, change):
    rewrite(plan.path, lambda data: {**data, "schedule": {**data["schedule"], **change}})
    with pytest.raises(BadFileError, match="its manifest does not fit"):
        Plan.open(plan.path)


def test_a_plan_is_a_plain_uncompressed_zip(plan):
    with zipfile.ZipFile(plan.path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", "encoder.onnx", "denoiser.onnx", "decoder.onnx"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert archive.read("denoiser.onnx") == PAYLOADS["denoiser"]
    assert PAYLOADS["denoiser"] in plan.path.read_bytes()


def test_the_same_content_gives_the_same_bytes(plan, tmp_path):
    again = write_plan(tmp_path / "other name.plan", make_manifest(), dict(PAYLOADS))
    assert again.path.read_bytes() == plan.path.read_bytes()


def test_a_plan_with_an_identity_is_private(plan, tmp_path):
    mask = os.umask(0o022)
    try:
        private = write_plan(tmp_path / "b.plan", make_manifest(identity_name="alice"), PAYLOADS)
        public = write_plan(tmp_path / "c.plan", make_manifest(), PAYLOADS)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(private.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.path.stat().st_mode) == 0o644


def test_opening_does_not_read_payloads(plan):
    raw = plan.path.read_bytes()
    for payload in PAYLOADS.values():
        raw = raw.replace(payload, bytes(len(payload)))  # reading one finds a wrong checksum
    plan.path.write_bytes(raw)
    assert Plan.open(plan.path).manifest == plan.manifest


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_flipped_byte_is_refused(plan, component):
    raw = bytearray(plan.path.read_bytes())
    raw[raw.index(PAYLOADS[component]) + 2] ^= 1
    plan.path.write_bytes(raw)
    opened = Plan.open(plan.path)
    with pytest.raises(BadFileError, match=component):
        opened.read(component)
    assert all(opened.read(c) == PAYLOADS[c] for c in COMPONENTS if c != component)


def test_an_exchanged_payload_is_refused(plan):
    # The zip's CRC is valid; only the hash in the manifest differs.
    with zipfile.ZipFile(plan.path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["denoiser.onnx"] = b"something else"
    with zipfile.ZipFile(plan.path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(BadFileError, match="denoiser does not match its sha256"):
        Plan.open(plan.path).read("denoiser")


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3000))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-30])


def half(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")


def other_manifest(path):
    rewrite(path, lambda data: {"name": "an app"})


def manifest_is_a_list(path):
    rewrite(path, lambda data: [data])


def newer(path):
    rewrite(path, lambda data: {**data, "schema": SCHEMA + 1, "something": "new"})


def climbing_name(path):
    payloads = json.loads(make_manifest().to_json())["payloads"]
    payloads["encoder"]["weights"] = "../encoder.weights"
    rewrite(path, lambda data: {**data, "payloads": payloads})


def unknown_field(path):
    rewrite(path, lambda data: {**data, "something": 1})


def lacking_field(path):
    rewrite(path, lambda data: {k: v for k, v in data.items() if k != "tile"})


def payloads_are_a_list(path):
    rewrite(path, lambda data: {**data, "payloads": []})


def odd_payload(path):
    rewrite(path, lambda data: {**data, "payloads": {"encoder": "encoder.onnx"}})


def lacking_component(path):
    rewrite(path, lambda data: {**data, "payloads": {k: v for k, v in data["payloads"].items() if k != "decoder"}})


def lacking_file(path):
    rewrite(path, without=("denoiser.onnx",))


DAMAGES = {
    empty: r"not a plan, or cut off \(\d+ bytes\); copy or export it again",
    foreign: r"not a plan, or cut off \(\d+ bytes\); copy or export it again",
    truncated: r"not a plan, or cut off \(\d+ bytes\); copy or export it again",
    half: r"not a plan, or cut off \(\d+ bytes\); copy or export it again",
    other_zip: r"not a plan, or cut off \(\d+ bytes\); copy or export it again",
    other_manifest: "but not a plan",
    manifest_is_a_list: "but not a plan",
    newer: f"plan schema {SCHEMA + 1}, this version reads 1 to {SCHEMA}",
    climbing_name: r"payload 'encoder.onnx' with weights '../encoder.weights'",
    unknown_field: "manifest does not fit.*something",
    lacking_field: "manifest does not fit.*tile",
    payloads_are_a_list: "manifest does not fit",
    odd_payload: "manifest does not fit",
    lacking_component: "lacks decoder",
    lacking_file: "lacks denoiser",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_plans_are_refused(plan, damage):
    damage(plan.path)
    with pytest.raises(BadFileError, match=DAMAGES[damage]) as caught:
        Plan.open(plan.path)
    assert str(caught.value).startswith(str(plan.path))
    assert "\n" not in str(caught.value)


def test_missing_plans_are_refused(tmp_path):
    for path, reason in ((tmp_path / "none.plan", "no such plan"), (tmp_path, "a folder")):
        with pytest.raises(BadFileError, match=reason):
            Plan.open(path)


def test_a_plan_that_may_not_be_read_is_not_called_damaged(plan, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pfstorer_rt.plan.read_entries", refuse)  # root may read every file
    with pytest.raises(BadFileError, match=r"cannot be opened \(.*Permission denied.*check its permissions"):
        Plan.open(plan.path)


def test_a_plan_cut_off_after_opening_is_refused(plan):
    half(plan.path)
    with pytest.raises(BadFileError, match="encoder is damaged"):
        plan.read("encoder")


def test_a_failed_write_leaves_the_old_plan(plan):
    before = plan.path.read_bytes()
    with pytest.raises(KeyError):
        write_plan(plan.path, make_manifest(), {**PAYLOADS, "unknown": b""})
    assert plan.path.read_bytes() == before
    assert [p.name for p in plan.path.parent.iterdir()] == ["a.plan"]


@pytest.mark.parametrize(
    "change", [{"compute_capabilities": ["abc"]}, {"compute_capabilities": "8.9"}, {"tools": 7}, {"tools": {"a": 1}}]
)
def test_a_manifest_with_values_of_another_type_is_refused(plan, change):
    rewrite(plan.path, lambda data: {**data, **change})
    with pytest.raises(BadFileError, match=f"manifest does not fit.*{next(iter(change))}"):
        Plan.open(plan.path)


@pytest.mark.parametrize("field", ["base_fingerprint", "identity_fingerprint"])
@pytest.mark.parametrize("value", ["/srv/photos", "../../../x", "", "..", "A" * 64, "0" * 63, "0" * 64 + "\n", 7])
def test_a_fingerprint_is_64_hexadecimal_digits(plan, field, value):
    rewrite(plan.path, lambda data: {**data, field: value})
    with pytest.raises(BadFileError, match=r"manifest does not fit.*expected 64 hexadecimal digits"):
        Plan.open(plan.path)


@pytest.mark.parametrize(
    "change",
    [
        {"base_name": "/srv/base"},
        {"base_name": "a; rm -rf ~"},
        {"identity_name": "../alice"},
        {"identity_name": "-x"},
        {"target": "os"},
        {"target": ["onnx"]},
        {"precision": "fp32 --trust-plan"},
    ],
)
def test_names_that_are_paths_are_refused(plan, change):
    rewrite(plan.path, lambda data: {**data, **change})
    with pytest.raises(BadFileError, match="manifest does not fit"):
        Plan.open(plan.path)


@pytest.mark.parametrize("file", ["/etc/passwd", "decoder.onnx", "encoder.onnx.exe", "..", "\u00e9ncoder.onnx"])
def test_a_payload_with_another_file_name_is_refused(plan, file):
    def change(data):
        data["payloads"]["encoder"]["file"] = file
        return data

    rewrite(plan.path, change)
    with pytest.raises(BadFileError, match=r"manifest does not fit.*for the encoder"):
        Plan.open(plan.path)


def test_a_graph_that_reads_another_file_is_refused(tmp_path, monkeypatch):
    """OpenVINO 2026.4 reads external data from the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(b"secret")
    location = field(13, field(1, b"location") + field(2, b"secret.bin"))
    data = field(7, field(5, b"\x10\x01" + location))  # a float32 constant
    manifest = make_manifest()
    entry = replace(manifest.payloads["encoder"], sha256=sha256_bytes(data))
    manifest = replace(manifest, payloads=manifest.payloads | {"encoder": entry})
    made = write_plan(tmp_path / "a.plan", manifest, {**PAYLOADS, "encoder": data})
    with pytest.raises(BadFileError, match=r"the encoder reads other files \('secret.bin'\)"):
        made.read("encoder")


def test_a_graph_with_an_engine_in_it_is_refused(tmp_path):
    """ONNX Runtime gives the engine in an EPContext node to its provider, which runs it."""
    data = field(PRODUCER, b"EPContext")
    manifest = make_manifest()
    entry = replace(manifest.payloads["encoder"], sha256=sha256_bytes(data))
    manifest = replace(manifest, payloads=manifest.payloads | {"encoder": entry})
    made = write_plan(tmp_path / "a.plan", manifest, {**PAYLOADS, "encoder": data})
    with pytest.raises(BadFileError, match=r"the encoder holds a compiled engine"):
        made.read("encoder")


def test_a_signature_that_is_not_ascii_is_invalid(tmp_path, monkeypatch):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    made = write_plan(tmp_path / "b.plan", make_manifest(target="tensorrt"), PAYLOADS)
    assert made.trusted
    with zipfile.ZipFile(made.path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(made.path, "w") as archive:
        for name, data in (parts | {SIGNATURE: b"\xff" * 64}).items():
            archive.writestr(name, data)
    assert not Plan.open(made.path).trusted


@pytest.mark.parametrize(("base", "known"), [("portrait", "portrait"), ("sd21", None)])
def test_rebuilding_names_a_base_only_if_it_is_shipped(tmp_path, base, known):
    made = write_plan(tmp_path / "b.plan", make_manifest(base_name=base, identity_name="al"), PAYLOADS)
    assert made.rebuild() == Rebuild("al", known, "onnx", "fp32", (), "b.plan")


def test_plans_of_the_first_schema_are_read(plan):
    def older(data):
        payloads = {c: {k: v for k, v in p.items() if "weights" not in k} for c, p in data["payloads"].items()}
        return {**data, "schema": 1, "payloads": payloads}

    rewrite(plan.path, older)
    assert {c: Plan.open(plan.path).read(c) for c in COMPONENTS} == PAYLOADS


WEIGHTS = bytes(range(251)) * 400


@pytest.fixture
def large(tmp_path):
    """A plan whose denoiser has a separate file of weights."""
    (tmp_path / "weights").write_bytes(WEIGHTS)
    manifest = make_manifest()
    entry = replace(manifest.payloads["denoiser"], weights="denoiser.weights", weights_sha256=sha256_bytes(WEIGHTS))
    manifest = replace(manifest, payloads=manifest.payloads | {"denoiser": entry})
    return write_plan(tmp_path / "large.plan", manifest, PAYLOADS, {"denoiser": tmp_path / "weights"})


def test_weights_beside_a_payload_are_mapped_and_unpacked(large):
    with zipfile.ZipFile(large.path) as archive:
        assert archive.read("denoiser.weights") == WEIGHTS
    assert large.read("denoiser") == PAYLOADS["denoiser"]
    with large.map_weights("denoiser") as weights:
        assert {name: bytes(view) for name, view in weights.items()} == {"denoiser.weights": WEIGHTS}
        kept = weights["denoiser.weights"]
    with pytest.raises(ValueError, match="released"):
        len(kept)
    with large.map_weights("encoder") as weights:
        assert weights == {}
    with large.unpack("denoiser") as path:
        assert path.read_bytes() == PAYLOADS["denoiser"]
        assert path.with_name("denoiser.weights").read_bytes() == WEIGHTS
    assert not path.parent.exists()


def test_damaged_weights_are_refused(large):
    raw = bytearray(large.path.read_bytes())
    raw[raw.index(WEIGHTS) + 2] ^= 1
    large.path.write_bytes(raw)
    for use in (large.read, lambda c: large.unpack(c).__enter__()):
        with pytest.raises(BadFileError, match="denoiser does not match its sha256"):
            use("denoiser")
    assert large.read("encoder") == PAYLOADS["encoder"]


def test_missing_and_compressed_weights_are_refused(large):
    with zipfile.ZipFile(large.path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(large.path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(BadFileError, match=r"not a plan.*is compressed"):
        Plan.open(large.path).read("denoiser")
    rewrite(large.path, without=("denoiser.weights",))
    with pytest.raises(BadFileError, match="lacks denoiser"):
        Plan.open(large.path)


def test_a_signature_holds_under_another_name(tmp_path):
    made = write_plan(tmp_path / "draft.plan", make_manifest(target="tensorrt-rtx"), PAYLOADS)
    moved = move_plan(made, tmp_path / "b.plan")
    assert moved.trusted and moved.path.name == "b.plan" and not made.path.exists()


@pytest.mark.parametrize(
    "target, built_for, wanted",
    [
        ("tensorrt-rtx", ["8.6", "8.9"], ("8.6", "8.9")),
        ("tensorrt-rtx", ["8.0", "12.0+"], ()),
        ("tensorrt", ["8.6"], ()),
    ],
)
def test_the_export_command_names_the_same_gpus(plan, target, built_for, wanted):
    manifest = make_manifest(target=target, compute_capabilities=built_for)
    assert Plan(plan.path, manifest).rebuild().compute_capabilities == wanted
    assert Plan(plan.path, manifest).rebuild(current=True).compute_capabilities == ("current",)
