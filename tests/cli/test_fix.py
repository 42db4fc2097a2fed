"""`fix`, and the speeds of `personalize` on a base with a prior."""

import json
from dataclasses import replace
from shutil import copy

import pytest
import torch
from PIL import Image

from pfstorer_rt import fix
from pfstorer_rt.config import WITHOUT_IMAGE_LOSSES, PersonalizeConfig
from pfstorer_rt.demo import reference_files
from pfstorer_rt.files import sha256_file
from pfstorer_rt.identity import Identity, identity_path
from pfstorer_rt.models.base import load_base
from pfstorer_rt.models.prior import Prior

PRIOR = {"start": "prior", "masked": False, "references": 3, "p_self": 0.0, "iterations": 2, "batch": 1}


@pytest.fixture
def known(nano_base, tmp_path):
    """Directory of a nano base with an open prior."""
    config = replace(nano_base.config, personalize=PRIOR)
    base = replace(nano_base.copy(), config=config)
    torch.manual_seed(0)
    base.prior = Prior(base.unet, config)
    for block in base.prior.blocks:
        block.gamma.data.fill_(1.0)
    return base.save(tmp_path / "known")


@pytest.fixture
def alice(photos):
    """Folder of the photographs of a person."""
    return photos[0].parent


def test_fix_writes_the_result_and_a_comparison(run, known, alice, save, tmp_path):
    old = save(tmp_path / "old" / "old.png")
    done = run("fix", old, "--person", alice, "--base", known)
    assert done.status == 0, done.err
    assert sorted(path.name for path in old.parent.iterdir()) == [
        "old.png",
        "old_restored.png",
        "old_restored_compare.png",
    ]
    plain = run("restore", "--base", known, old, "-o", tmp_path / "plain.png")
    assert plain.status == 0
    assert (tmp_path / "plain.png").read_bytes() != (old.parent / "old_restored.png").read_bytes()


def test_fix_removes_scratches_on_demand(run, known, alice, save, tmp_path, monkeypatch):
    from pfstorer_rt.runtime import restorer

    seen = []
    monkeypatch.setattr(restorer, "without_scratches", lambda rows: seen.append(rows) or rows)
    for name, flags in (("a.png", ()), ("b.png", ("--remove-scratches",))):
        call = ("fix", save(tmp_path / name), "--person", alice, "--base", known, *flags)
        assert run(*call).status == 0 and len(seen) == len(flags)


def test_fix_stores_no_identity(run, known, alice, save, tmp_path, people, tree):
    before = tree(people)
    assert run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known).status == 0
    assert tree(people) == before


def test_fix_uses_the_identity_of_the_same_photographs(run, known, alice, photos, save, tmp_path, people):
    learned = run("personalize", "--identity", "bob", "--base", known, *photos)
    assert learned.status == 0, learned.err
    done = run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known)
    assert "identity bob" in done.err
    photos[0].unlink()
    other = run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known, "--overwrite")
    assert other.status == 0 and "identity bob" not in other.err


def test_fix_uses_the_identity_where_a_photograph_is_left_out(run, known, alice, photos, save, tmp_path, people):
    Image.open(photos[0]).resize((36, 40)).save(alice / "copy.png")
    learned = run("personalize", "--identity", "bob", "--base", known, alice)
    assert "copy.png: left out" in learned.err and f"learned from {len(photos)} photographs" in learned.out
    assert set(Identity.load(identity_path("bob")).references) == {sha256_file(path) for path in photos}
    call = ("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known, "--overwrite")
    assert "identity bob" in run(*call).err
    (alice / "copy.png").unlink()
    assert "identity bob" in run(*call).err, "the same photographs without the copy"
    save(alice / "new.png", seed=9)
    assert "identity bob" not in run(*call).err, "a photograph that would be used"


def test_fix_names_an_encrypted_identity_that_it_cannot_open(
    run, known, alice, photos, save, tmp_path, people, monkeypatch
):
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "a long passphrase")
    assert run("personalize", "--identity", "bob", "--base", known, *photos).status == 0
    call = ("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known, "--overwrite")
    assert "identity bob: learned from these photographs" in run(*call).err
    monkeypatch.delenv("PFSTORER_PASSPHRASE")
    done = run(*call)
    assert done.status == 0 and "identity bob is encrypted" in done.err and "PFSTORER_PASSPHRASE" in done.err


def test_fix_uses_an_identity_of_all_photographs(run, known, alice, photos, save, tmp_path, people):
    Image.open(photos[0]).resize((36, 40)).save(alice / "copy.png")
    learned = run("personalize", "--identity", "bob", "--base", known, alice, "--keep-all")
    assert f"learned from {len(photos) + 1} photographs" in learned.out
    assert "identity bob" in run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known).err


def test_fix_restores_without_an_identity_on_a_base_without_a_prior(run, nano_base_dir, alice, save, tmp_path, people):
    old = save(tmp_path / "old.png")
    done = run("fix", old, "--person", alice, "--base", nano_base_dir)
    assert done.status == 0 and "has no prior" in done.err
    run("restore", "--base", nano_base_dir, old, "-o", tmp_path / "plain.png")
    assert (tmp_path / "old_restored.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_fix_trains_briefly_from_the_start_of_a_training(run, known, alice, save, tmp_path, people, tree, monkeypatch):
    started = load_base(known)
    started.prior.instant = False
    started.save(known, torch.float32)
    seen = []
    learn = fix.brief_identity
    monkeypatch.setattr(fix, "brief_identity", lambda *arguments: seen.append(learn(*arguments)) or seen[-1])
    before, old = tree(people), save(tmp_path / "old.png")
    done = run("fix", old, "--person", alice, "--base", known)
    assert done.status == 0 and "learned in 2 iterations, and the identity is not stored" in done.err
    assert tree(people) == before
    (identity,) = seen
    plain = torch.cat([block.gamma for block in started.prior.blocks]).half()
    learned = torch.cat([identity.tensors[f"blocks.{i}.gamma"] for i in range(len(started.prior.blocks))])
    assert identity.settings["train"]["iterations"] == 2 and not torch.equal(plain, learned)
    again = run("fix", old, "--person", alice, "--base", known)
    assert again.status == 1 and "exists already" in again.err and "learned" not in again.err, "before the learning"
    run("restore", "--base", known, old, "-o", tmp_path / "plain.png")
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "old_restored.png").read_bytes()


def test_restore_with_references_alone_learns_the_person(run, known, nano_base_dir, save, tmp_path):
    (tmp_path / "refs").mkdir()
    for path in reference_files()[:2]:  # with faces, because `restore` measures the distance to them
        copy(path, tmp_path / "refs")
    old = save(tmp_path / "old.png")
    assert run("restore", "--base", known, "--refs", tmp_path / "refs", old, "-o", tmp_path / "with.png").status == 0
    assert run("fix", old, "--person", tmp_path / "refs", "--base", known).status == 0
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "old_restored.png").read_bytes()
    plain = run("restore", "--base", nano_base_dir, "--refs", tmp_path / "refs", old, "-o", tmp_path / "without.png")
    assert plain.status == 0, "a base without a prior restores without an identity"


def test_speeds_have_different_lengths(run, known, photos, people):
    default = PersonalizeConfig.for_base(load_base(known).config)
    pools = {}
    for flag, iterations in (("--instant", 0), ("--thorough", 8), (None, 2)):
        done = run(
            "personalize", "--identity", "bob", "--base", known, *photos, "--overwrite", *([flag] if flag else [])
        )
        assert done.status == 0, done.err
        settings = Identity.load(identity_path("bob")).settings
        assert settings["train"]["iterations"] == iterations
        pools[flag] = settings["pool"]
    assert pools == {"--instant": default.pool, "--thorough": 4 * default.pool, None: default.pool}


def test_speeds_exclude_each_other(refused, known, photos):
    refused(
        2, "personalize", "--identity", "bob", "--base", known, *photos, "--instant", "--thorough", words=["one of"]
    )
    call = ("personalize", "--identity", "bob", "--base", known, *photos, "--recipe", "paper", "--thorough")
    refused(2, *call, words=["--thorough is for the recipe of the base"])


def test_the_papers_recipe_starts_closed(run, known, photos, people):
    call = ("personalize", "--identity", "bob", "--base", known, "--recipe", "paper", "--iterations", 1, "--batch", 1)
    assert run(*call, *photos).status == 0
    settings = Identity.load(identity_path("bob")).settings
    wanted = {"start": "closed", "references": 1, "lambda_gen": 0.1, "masked": True, **WITHOUT_IMAGE_LOSSES}
    assert {name: settings[name] for name in wanted} == wanted


def test_instant_reports_a_base_without_a_prior(refused, nano_base_dir, photos):
    refused(2, "personalize", "--identity", "bob", "--base", nano_base_dir, *photos, "--instant", words=["no prior"])


def test_fix_prints_json(run, known, alice, save, tmp_path):
    done = run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known, "--json")
    assert json.loads(done.out)["status"] == "done"


def test_a_name_in_place_of_the_folder_of_photographs_is_explained(refused, people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = "`pfstorer-rt restore --base portrait --identity alice INPUTS`"
    refused(2, "fix", "a.png", "--person", "alice", words=["alice: an identity, expected a folder", call])
    refused(2, "fix", "a.png", "--person", "bob", words=["bob: no such folder; expected a folder of photographs"])


def test_fix_mentions_inputs_that_are_passed_over(run, known, alice, save, tmp_path):
    save(tmp_path / "scans" / "a.png")
    save(tmp_path / "scans" / "b_restored.png")
    (tmp_path / "scans" / "c.psd").write_bytes(b"")
    done = run("fix", tmp_path / "scans", "--person", alice, "--base", known, "-o", tmp_path / "out")
    assert done.status == 0 and "c.psd" in done.err and "b_restored.png: left out" in done.err


def test_fix_has_the_notes_of_the_engine(run, known, alice, save, tmp_path):
    done = run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known)
    assert "the identity acts on every face of an image" in done.err, "the photographs show no face"


def test_fix_refuses_a_strength_before_learning(run, known, alice, save, tmp_path):
    done = run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known, "--strength", "11")
    assert done.status == 2 and "expected -10 to 10" in done.err and "identity" not in done.err.splitlines()[0]
    assert not (tmp_path / "old_restored.png").exists()


def test_fix_uses_the_longest_training(run, known, alice, photos, save, tmp_path, people):
    for name, count in (("al", 1), ("bob", 2)):
        assert run("personalize", "--identity", name, "--base", known, "--iterations", count, *photos).status == 0
    done = run("fix", save(tmp_path / "old.png"), "--person", alice, "--base", known)
    assert "identity bob" in done.err and "in 2 iterations" in done.err


def test_fix_learns_nothing_for_images_that_cannot_be_read(run, known, alice, save, tmp_path, monkeypatch):
    monkeypatch.setattr(fix, "restorer_for", lambda *_: pytest.fail("learned"))
    save(tmp_path / "old_restored.png")
    save(tmp_path / "old.png")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    inputs = [tmp_path / name for name in ("missing.png", "text.jpg", "old.png")]
    done = run("fix", *inputs, "--person", alice, "--base", known)
    assert done.status == 1 and len(done.errors) == 2 and "exists, skipped" in done.out
    assert "missing.png" in done.errors[0] and "text.jpg" in done.errors[1]


def test_fix_restores_the_images_that_can_be_read(run, known, alice, save, tmp_path):
    done = run("fix", tmp_path / "missing.png", save(tmp_path / "old.png"), "--person", alice, "--base", known)
    assert done.status == 1 and len(done.errors) == 1 and (tmp_path / "old_restored.png").is_file()


def test_fix_learns_nothing_if_the_result_cannot_be_written(run, known, alice, save, tmp_path, monkeypatch):
    monkeypatch.setattr(fix, "restorer_for", lambda *_: pytest.fail("learned"))
    old = save(tmp_path / "old.png")
    done = run("fix", old, "--person", alice, "--base", known, "-o", tmp_path / f"{'x' * 300}.png")
    assert done.status == 1 and len(done.errors) == 1 and "name too long" in done.errors[0].lower()
