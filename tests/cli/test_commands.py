import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def people(monkeypatch, tmp_path, nano_identity):
    """A data directory with the identity `alice` in it; returns its folder of identities."""
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    nano_identity.save(tmp_path / "home" / "identities" / "alice.safetensors")
    return tmp_path / "home" / "identities"


@pytest.fixture
def other_base_dir(tmp_path):
    from pfstorer_rt.models.base import build_base

    return build_base("nano", seed=7).save(tmp_path / "other")


def learn(run, base, photos, *more):
    return run("personalize", "--base", base, "--iterations", 2, "--batch", 1, *photos, *more)


# ---- inspect


def test_inspect_shows_a_base(run, nano_base_dir, nano_base):
    report = json.loads(run("inspect", nano_base_dir, "--json").out)
    assert report["artefact"] == "base" and report["fingerprint"] == nano_base.fingerprint
    assert report["config"]["name"] == "nano"
    assert report["parameters"]["unet"] == sum(p.numel() for p in nano_base.unet.parameters())
    assert f"fingerprint: {nano_base.fingerprint}" in run("inspect", nano_base_dir).out


def test_inspect_shows_an_identity_by_file_and_by_name(run, people, nano_identity):
    by_file = json.loads(run("inspect", people / "alice.safetensors", "--json").out)
    assert by_file == json.loads(run("inspect", "alice", "--json").out)
    assert by_file["artefact"] == "identity" and by_file["fingerprint"] == nano_identity.fingerprint
    assert by_file["tensors"]["token"] == ["float16", *nano_identity.tensors["token"].shape]
    text = run("inspect", "alice").out
    assert "method: pfstorer" in text and f"tensors: {len(nano_identity.tensors)}" in text


def test_inspect_shows_a_plan(run, nano_plan):
    report = json.loads(run("inspect", nano_plan.path, "--json").out)
    assert report["artefact"] == "plan" and report["identity_name"] == "alice"
    sizes = {name: payload["bytes"] for name, payload in report["payloads"].items()}
    assert sizes == {name: len(nano_plan.read(name)) for name in ("encoder", "denoiser", "decoder")}
    assert "identity_name: alice" in run("inspect", nano_plan.path).out


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


# ---- identities


def test_list_includes_unreadable_identities(run, people):
    (people / "broken.safetensors").write_bytes(b"")
    (people / "notes.txt").write_text("not an identity")
    rows = [json.loads(line) for line in run("identities", "list", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == ["alice", "broken"]
    assert rows[0]["method"] == "pfstorer" and rows[0]["references"] == 1 and "error" in rows[1]
    text = run("identities", "list")
    assert text.status == 0 and "alice  pfstorer on nano" in text.out and "broken  unreadable" in text.out


def test_listing_no_identities_succeeds(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "nowhere"))
    assert (run("identities", "list", "--json").out, run("identities", "list").status) == ("", 0)
    assert "personalize" in run("identities", "list").err and not (tmp_path / "nowhere").exists()


def test_show_prints_an_identity_as_json(run, people, nano_identity):
    report = json.loads(run("identities", "show", "alice", "--json").out)
    assert report["base_fingerprint"] == nano_identity.base_fingerprint and set(report["gamma"]) == set(
        nano_identity.layers
    )


@pytest.mark.parametrize("command", ["show", "verify", "rm"])
@pytest.mark.parametrize("name", ["bob", "no such/bob.safetensors", "?", ""])
def test_unknown_identities_are_refused(refused, people, tree, command, name):
    before = tree(people)
    refused(2, "identities", command, name)
    assert tree(people) == before


def test_verify_checks_file_permissions_base_and_references(run, people, save, monkeypatch, nano_base_dir):
    monkeypatch.chdir(nano_base_dir.parent)  # the base is found by its name there
    good = run("identities", "verify", "alice")
    assert good.status == 0 and "FAILED" not in good.out and good.out.count("ok ") == 3
    stranger = run("identities", "verify", "alice", save(people / "x.png"))
    assert stranger.status == 1 and "FAILED  learned from" in stranger.out
    assert f"learned from {people / 'x.png'}" in run("identities", "verify", "alice", people).out, "folders too"
    (people / "alice.safetensors").chmod(0o644)
    assert "FAILED  readable by its owner only" in run("identities", "verify", "alice").out


def test_verify_fails_without_the_base_or_with_another_base(run, people, monkeypatch, other_base_dir):
    missing = run("identities", "verify", "alice")
    assert missing.status == 1 and "no base there" in missing.out
    other_base_dir.rename(other_base_dir.with_name("nano"))
    monkeypatch.chdir(other_base_dir.parent)
    assert "FAILED  base nano" in run("identities", "verify", "alice").out


def test_rm_deletes_an_identity_and_its_training_checkpoint(run, people, tree):
    (people / "alice.training.pt").write_bytes(b"weights")
    (people / "notes.txt").write_text("kept")
    assert run("identities", "rm", "alice", stdin=b"n\n").status == 0
    unanswered = run("identities", "rm", "alice")
    assert (
        unanswered.status == 2
        and "alice was not deleted: the question was not answered; pass --yes" in unanswered.errors[0]
    )
    assert len(tree(people)) == 3
    assert run("identities", "rm", "alice", "--yes").out == "alice: deleted\n"
    assert list(tree(people)) == ["notes.txt"]


def test_rm_deletes_nothing_when_one_name_is_unknown(refused, people, tree):
    before = tree(people)
    refused(2, "identities", "rm", "alice", "bob", "--yes", words=["bob"])
    assert tree(people) == before


def test_rm_deletes_a_damaged_identity_but_no_other_file(run, refused, people, tmp_path):
    (people / "broken.safetensors").write_bytes(b"cut off")
    assert run("identities", "rm", "broken", "--yes").status == 0
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    refused(2, "identities", "rm", thesis, "--yes", words=["thesis.txt"])
    assert thesis.read_text() == "years of work"


def hostile_identity(path, fingerprint, source=None):
    """An identity file with the fingerprint of another one, or with a path in its place."""
    import safetensors.numpy
    from safetensors import safe_open

    tensors, meta = {}, {"kind": "pfstorer-identity", "schema": "1"}
    if source:
        with safe_open(source, "np") as handle:
            meta = handle.metadata()
        tensors = {"token": np.zeros(4, np.float32)}
    safetensors.numpy.save_file(tensors, path, {**meta, "fingerprint": fingerprint})
    return path


@pytest.mark.parametrize("form", ["{folder}", "..", "", "../../{name}", "."])
@pytest.mark.parametrize("whole", [True, False])
def test_rm_deletes_no_folder_named_in_an_identity_file(run, people, tree, tmp_path, form, whole):
    folder = tmp_path / "photographs"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.jpg").write_bytes(b"a memory")
    cache = people.parent / "cache" / "openvino" / "0123456789abcdef"
    cache.mkdir(parents=True)
    (cache / "a.blob").write_bytes(b"somebody else's")
    source = people / "alice.safetensors" if whole else None
    named = form.format(folder=folder, name=folder.name)
    gift = hostile_identity(tmp_path / "gift.safetensors", named, source)
    hostile_identity(people / "mallory.safetensors", named, source)
    run("identities", "rm", gift, "--yes")
    assert run("identities", "rm", "mallory", "--yes").status == 0
    assert tree(folder) == {"deep/a.jpg": b"a memory"}
    assert tree(cache) == {"a.blob": b"somebody else's"}


def test_rm_deletes_only_the_compiled_networks_of_this_identity(run, people, nano_identity):
    own = people.parent / "cache" / "openvino" / nano_identity.fingerprint[:16]
    own.mkdir(parents=True)
    (own / "a.blob").write_bytes(b"weights")
    hostile_identity(people / "mallory.safetensors", nano_identity.fingerprint, people / "alice.safetensors")
    assert run("identities", "rm", "mallory", "--yes").status == 0
    assert own.is_dir(), "the tensors of that file do not have this fingerprint"
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert not own.exists()


def test_rm_by_path_deletes_no_file_of_another_program(run, refused, tmp_path):
    import torch

    folder = tmp_path / "photos.training.pt"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"a memory")
    thesis, own = tmp_path / "model.training.pt", tmp_path / "alice.training.pt"
    torch.save({"weights": torch.zeros(3)}, thesis)
    torch.save({"iteration": 1, "signature": "", "parameters": {}}, own)
    for name in ("photos", "model"):
        refused(2, "identities", "rm", tmp_path / f"{name}.safetensors", "--yes", words=("no such identity",))
    assert (folder / "a.jpg").exists() and thesis.exists()
    assert run("identities", "rm", tmp_path / "alice.safetensors", "--yes").status == 0
    assert not own.exists()


def test_rm_deletes_the_networks_before_the_identity(run, people, nano_identity, monkeypatch):
    """Without the identity, nothing could tell which networks are its own."""
    own = people.parent / "cache" / "openvino" / nano_identity.fingerprint[:16]
    own.mkdir(parents=True)

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fails)
        assert run("identities", "rm", "alice", "--yes").status == 1
    assert (people / "alice.safetensors").exists()
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert not own.exists()


def test_rm_removes_temporary_files_of_killed_processes(run, people):
    left = [people / ".pfstorer-1.tmp", people.parent / "cache" / "work" / ".pfstorer-2.tmp"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a person")
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert not any(path.exists() for path in left)


def test_rm_warns_about_networks_outside_the_cache(run, people, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (people.parent / "cache").mkdir(exist_ok=True)
    (people.parent / "cache" / "openvino").symlink_to(elsewhere)
    made = run("identities", "rm", "alice", "--yes")
    assert made.status == 0 and "may be left in" in made.err


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
    shown = run("inspect", gift).out
    assert "\x1b" not in shown and r"\x1b[2J: \x1b[2J" in shown
    assert r"\x1b[2J" in refused(2, "inspect", f"{clear}.safetensors")


# ---- doctor


def test_doctor_reports_every_backend(run):
    from pfstorer_rt.engine.session import BACKENDS
    from pfstorer_rt.ops import BACKENDS as ATTENTION

    report = json.loads(run("doctor", "--json").out)
    assert set(report["engines"]) == {"torch", *BACKENDS} and set(report["attention"]) == set(ATTENTION)
    assert report["engines"]["onnxruntime"] is None and report["attention"]["reference"] is None
    for refusals in (report["engines"], report["attention"], report["metrics"]):
        assert all(reason is None or len(reason) > 10 for reason in refusals.values())
    text = run("doctor").out
    assert "engine    onnxruntime: ready" in text and report["home"] in text


def test_doctor_names_the_packages_to_install(run, monkeypatch):
    for name in ("openvino", "stlpips_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    report = json.loads(run("doctor", "--json").out)
    assert "pip install" in report["engines"]["openvino"] and "pip install" in report["metrics"]["st-lpips"]


# ---- degrade


def test_degrade_is_deterministic_for_a_seed(run, save, tree, tmp_path):
    image = save(tmp_path / "a.png", 64, 48)

    def bad(*arguments):
        assert run("degrade", image, "-o", tmp_path / "b.png", "--overwrite", *arguments).status == 0
        with Image.open(tmp_path / "b.png") as result:
            assert result.size == (64, 48)
        return (tmp_path / "b.png").read_bytes()

    first = bad("--seed", 4)
    assert bad("--seed", 4) == first
    others = [bad("--seed", 5), bad("--seed", 4, "--level", "light"), image.read_bytes()]
    assert len({first, *others}) == 4


def test_heavy_is_further_from_the_original_than_light(run, save, tmp_path):
    images = [save(tmp_path / "in" / f"{i}.png", 64, 64, seed=i) for i in range(6)]

    def distance(level):
        assert run("degrade", tmp_path / "in", "-o", tmp_path / level, "--level", level).status == 0
        pairs = [(p, tmp_path / level / f"{p.stem}_degraded.png") for p in images]
        return np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in pairs])

    assert distance("heavy") > distance("light")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, np.float32)


def test_each_image_of_a_call_is_degraded_differently(run, save, tree, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, 48, 48)
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "out", "--seed", 1).status == 0
    assert run("degrade", tmp_path / "in" / "b.png", "-o", tmp_path / "b.png", "--seed", 2).status == 0
    out = tree(tmp_path / "out")
    assert out["a_degraded.png"] != out["b_degraded.png"] == (tmp_path / "b.png").read_bytes()


def test_a_repeated_degrade_completes_the_results(run, save, tree, tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", 48, 48, seed=i)
    (tmp_path / "in" / "1.png").write_bytes(b"damaged")
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "out").status == 1
    save(tmp_path / "in" / "1.png", 48, 48, seed=1)
    (tmp_path / "out" / "2_degraded.png").unlink()
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "out").status == 0
    assert run("degrade", tmp_path / "in", "-o", tmp_path / "at once").status == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "at once")


# ---- personalize


def test_personalize_leaves_only_a_private_identity_file(run, tree, photos, tmp_path, nano_base_dir):
    done = learn(run, nano_base_dir, photos, "--identity", "bob", "-o", tmp_path / "out" / "bob.safetensors")
    assert done.status == 0 and "bob" in done.out, done.err
    assert f"note: {photos[0]}: no face found" in done.err
    assert "earlier run" not in done.err and "resuming" not in done.err
    assert list(tree(tmp_path / "out")) == ["bob.safetensors"]
    assert stat.S_IMODE((tmp_path / "out" / "bob.safetensors").stat().st_mode) == 0o600


def test_personalize_by_name_saves_to_the_list_and_prints_json(run, people, photos, nano_base_dir):
    done = learn(run, nano_base_dir, photos, "--identity", "bob", "--json")
    report = json.loads(done.out)
    assert report["identity"] == "bob" and Path(report["file"]) == people / "bob.safetensors"
    assert [json.loads(x)["name"] for x in run("identities", "list", "--json").out.splitlines()] == ["alice", "bob"]


def test_personalize_replaces_an_identity_only_with_overwrite(run, people, tree, photos, nano_base_dir):
    before = tree(people)
    done = learn(run, nano_base_dir, photos, "--identity", "alice")
    assert done.status and len(done.errors) == 1 and "--overwrite" in done.errors[0] and tree(people) == before
    assert learn(run, nano_base_dir, photos, "--identity", "alice", "--overwrite").status == 0
    assert list(tree(people)) == ["alice.safetensors"] and tree(people) != before


@pytest.mark.parametrize("bad", [b"", b"\x89PNG\r\n", b"text"])
def test_an_unreadable_photograph_stops_personalize_before_training(refused, people, tree, photos, nano_base_dir, bad):
    photos[1].write_bytes(bad)
    before = tree(people)
    refused(2, "personalize", "--identity", "bob", "--base", nano_base_dir, *photos, words=["1.png"])
    assert tree(people) == before


@pytest.mark.parametrize(
    ("name", "base", "extra"),
    [
        ("../bob", None, None),
        ("bob.safetensors", None, None),
        ("a b", None, None),
        ("bob", "no-base", None),
        ("bob", None, "no-photograph"),
    ],
)
def test_invalid_personalize_calls_print_one_line(
    refused, people, tree, photos, nano_base_dir, tmp_path, monkeypatch, name, base, extra
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    more = [tmp_path / extra] if extra else []
    refused(2, "personalize", "--identity", name, "--base", base or nano_base_dir, *photos, *more)
    assert tree(tmp_path) == before


def test_a_full_disk_prints_one_line(run, people, tree, photos, nano_base_dir, full_disk):
    before = tree(people)
    done = learn(run, nano_base_dir, photos, "--identity", "bob")
    assert done.status == 1 and len(done.errors) == 1 and "no space left" in done.errors[0]
    assert tree(people) == before


# ---- export: what it refuses before any work (what it makes: tests/export)


def test_export_refuses_an_existing_output(run, tree, tmp_path, nano_base_dir):
    (tmp_path / "a.plan").write_bytes(b"precious")
    before = tree(tmp_path)
    done = run("export", "--base", nano_base_dir, "-o", tmp_path / "a.plan")
    assert done.status and len(done.errors) == 1 and "--overwrite" in done.errors[0] and tree(tmp_path) == before


def test_export_refuses_an_identity_of_another_base(refused, people, tmp_path, other_base_dir):
    wrong = ("export", "--identity", "alice", "--base", other_base_dir, "-o", tmp_path / "a.plan")
    refused(2, *wrong, words=["alice", "learned on base"])
    assert not (tmp_path / "a.plan").exists()


@pytest.mark.parametrize("arguments", [("--identity", "nobody"), ("--base", "no-base"), ("--identity", "?"), ()])
def test_export_of_a_missing_identity_or_base_exits_with_2(run, people, tmp_path, arguments):
    done = run("export", *arguments, "-o", tmp_path / "a.plan")
    assert done.status == 2 and len(done.errors) == 1 and not (tmp_path / "a.plan").exists()


def test_export_into_a_missing_folder_is_refused(run, tmp_path, nano_base_dir):
    done = run("export", "--base", nano_base_dir, "-o", tmp_path / "no" / "a.plan")
    assert done.status and len(done.errors) == 1 and "folder" in done.errors[0]


# ---- bench


def test_bench_writes_csv_plot_and_json(run, nano_plan, tmp_path):
    import csv

    done = run(
        "bench",
        "--engine",
        nano_plan.path,
        "--backend",
        "onnxruntime",
        "--steps",
        1,
        "--runs",
        2,
        "--size",
        64,
        "--size",
        100,
        "--csv",
        tmp_path / "b.csv",
        "--plot",
        tmp_path / "b.png",
        "--json",
    )
    report = json.loads(done.out)
    assert report["provider"] == "CPUExecutionProvider" and report["method"].startswith("wall clock")
    assert set(report["clock"]) == {"mhz", "governor", "load_before", "load_after"}
    sizes, parts = report["images_ms"], report["components_ms"]
    assert list(sizes) == ["image 64x64", "image 100x100"] and set(parts) > {"encoder", "denoiser", "decoder"}
    for figures in {**sizes, **parts}.values():
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"] and figures["runs"] == 2
    large = sizes["image 100x100"]
    assert large["tiles_per_s"] == pytest.approx(9 / large["p50"] * 1e3)  # 128 pixels, tiles 48 apart: 3 x 3
    assert large["megapixels_per_s"] == pytest.approx(0.01 / large["p50"] * 1e3)
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [row["measured"] for row in rows] == [*parts, *sizes]
    assert float(rows[-1]["p50"]) == large["p50"] and rows[0]["processor"]
    with Image.open(tmp_path / "b.png") as plot:
        assert plot.format == "PNG" and plot.getcolors(1 << 20)


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_bench_overwrites_no_file(refused, nano_plan, tmp_path, option):
    (tmp_path / "notes").write_text("precious")
    refused(1, "bench", "--engine", nano_plan.path, option, tmp_path / "notes", words=("--overwrite",))
    assert (tmp_path / "notes").read_text() == "precious"
