"""`personalize`."""

import json
import stat
from pathlib import Path

import pytest

from pfstorer_rt.identity import Identity
from pfstorer_rt.imaging.files import image_size


def learn(run, base, photos, *more):
    return run("personalize", "--base", base, "--iterations", 2, "--batch", 1, *photos, *more)


def test_personalize_leaves_only_a_private_identity_file(run, tree, photos, tmp_path, nano_base_dir):
    done = learn(run, nano_base_dir, photos, "--identity", "bob", "-o", tmp_path / "out" / "bob.safetensors")
    assert done.status == 0 and "bob" in done.out, done.err
    assert f"--base {nano_base_dir} -o bob.plan" in done.out, "the base of the next command"
    assert f"note: {photos[0]}: no face found" in done.err
    assert "earlier run" not in done.err and "resuming" not in done.err
    assert list(tree(tmp_path / "out")) == ["bob.safetensors"]
    assert stat.S_IMODE((tmp_path / "out" / "bob.safetensors").stat().st_mode) == 0o600


def test_the_weights_of_the_losses_are_settings_of_the_identity(run, people, photos, nano_base_dir):
    names = ("lambda_gen", "lambda_pixel", "lambda_color", "lambda_perceptual", "lambda_id", "lambda_face")
    weights = {name: float(number) for number, name in enumerate(names, 1)}
    options = [text for name, value in weights.items() for text in ("--" + name.replace("_", "-"), value)]
    assert learn(run, nano_base_dir, photos, "--identity", "bob", *options).status == 0
    settings = Identity.load(people / "bob.safetensors").settings
    assert {name: settings[name] for name in weights} == weights


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
def test_an_unreadable_photograph_is_left_out(run, people, photos, nano_base_dir, bad):
    photos[1].write_bytes(bad)
    done = learn(run, nano_base_dir, photos, "--identity", "bob")
    assert done.status == 0 and f"note: left out: {photos[1]}: " in done.err
    assert f"learned from {len(photos) - 1} photographs" in done.out


def test_personalize_ends_before_training_if_no_photograph_can_be_read(refused, people, tree, photos, nano_base_dir):
    for photo in photos:
        photo.write_bytes(b"text")
    before = tree(people)
    refused(2, "personalize", "--identity", "bob", "--base", nano_base_dir, *photos, words=["0.png"])
    assert tree(people) == before


def test_instant_is_refused_on_a_base_without_a_prior(refused, people, photos, nano_base_dir):
    refused(2, "personalize", "--identity", "bob", "--base", nano_base_dir, "--instant", *photos, words=["no prior"])


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
    run("identities", "rm", "bob", "--yes")  # the crops are kept for the next call
    assert tree(people) == before


def test_a_contact_sheet_replaces_a_file_only_with_overwrite(run, people, photos, tmp_path, nano_base_dir):
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"mine")
    call = (run, nano_base_dir, photos, "--identity", "bob", "--contact-sheet", sheet)
    done = learn(*call)
    assert done.status and "--overwrite" in done.errors[0] and sheet.read_bytes() == b"mine"
    assert learn(*call, "--overwrite").status == 0
    assert image_size(sheet)[1] > 3 * 200, "three photographs beside each other"


def test_a_contact_sheet_among_the_photographs_is_refused(run, people, tree, photos, tmp_path, nano_base_dir):
    before = tree(tmp_path)
    done = learn(run, nano_base_dir, photos, "--identity", "bob", "--contact-sheet", photos[0].parent / "sheet.png")
    assert done.status == 2 and "reference photographs" in done.errors[0] and "--contact-sheet" in done.errors[0]
    assert tree(tmp_path) == before


def test_a_folder_of_very_many_photographs_is_refused(refused, nano_base_dir, save, people, tmp_path):
    first = save(tmp_path / "all" / "0.png")
    for i in range(1, 101):
        (first.parent / f"{i}.png").write_bytes(first.read_bytes())
    call = ("personalize", "--identity", "bob", "--base", nano_base_dir, first.parent)
    refused(2, *call, words=["101 photographs", "expected at most 100", "folder of their own"])


def test_photographs_by_a_pattern(run, people, photos, nano_base_dir):
    done = learn(run, nano_base_dir, [photos[0].parent / "*.png"], "--identity", "bob")
    assert done.status == 0 and f"learned from {len(photos)} photographs" in done.out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--learning-rate", -1, "(--learning-rate)"),
        ("--precision", "fp16", "(--precision)"),
        ("--contact-sheet", "sheet.xyz", "(--contact-sheet)"),
        ("--output", "new/", "'new/' is not a file"),
    ],
)
def test_a_refused_option_is_named_before_a_photograph_is_read(
    refused, people, tree, photos, nano_base_dir, monkeypatch, tmp_path, option, value, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pfstorer_rt.training.framing.read_photo", lambda path: pytest.fail("read"))
    before = tree(tmp_path)
    refused(2, "personalize", "--identity", "bob", "--base", nano_base_dir, *photos, option, value, words=[words])
    assert tree(tmp_path) == before
