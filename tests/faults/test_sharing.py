"""Two processes with the same files, full and read-only disks, vanished and damaged files: one clear outcome each."""

import errno
import os
import shutil

import numpy as np
import pytest

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.engine.session import Session
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.identity import Identity, training_files
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.runtime.batch import BatchConfig, restore_files
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.personalize import personalize

ONE_STEP = BatchConfig(RestoreConfig(steps=1))


@pytest.fixture
def restorer(nano_base):
    with Restorer.from_base(nano_base, device="cpu") as made:
        yield made


@pytest.fixture
def images(tmp_path, make_image):
    """A folder with the images 0.png, 1.png and 2.png."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        save_image(folder / f"{number}.png", make_image(24, 40, number))
    return folder


@pytest.fixture
def refuse_new_files(monkeypatch):
    """Function (folder, error number): no file can be made below the folder."""
    original = os.open

    def refuse(folder, number):
        def opened(path, flags, *more, **others):
            if flags & os.O_CREAT and os.fspath(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return original(path, flags, *more, **others)

        monkeypatch.setattr(os, "open", opened)

    return refuse


@pytest.mark.parametrize("named", [True, False])
def test_the_slower_of_two_restorations_keeps_the_result_of_the_faster(restorer, images, tmp_path, monkeypatch, named):
    inputs, passes, faster = [images / "0.png"] if named else [images], restorer.passes, []

    def overtaken(*arguments):
        monkeypatch.setattr(restorer, "passes", passes)
        faster.extend(restore_files(restorer, inputs, tmp_path / "out", ONE_STEP))
        return passes(*arguments)

    monkeypatch.setattr(restorer, "passes", overtaken)
    slower = restore_files(restorer, inputs, tmp_path / "out", ONE_STEP)
    assert {outcome.status for outcome in faster} == {"done"} and {outcome.status for outcome in slower} == {"skipped"}
    assert slower[0].notes == ("another process wrote the result meanwhile",)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_an_image_that_vanishes_fails_alone(restorer, images, tmp_path):
    (tmp_path / "in" / "1.png").unlink()
    (tmp_path / "in" / "1.png").symlink_to(tmp_path / "vanished.png")
    inputs = [images / f"{number}.png" for number in range(3)]
    done = restore_files(restorer, inputs, tmp_path / "out", ONE_STEP)
    assert [outcome.status for outcome in done] == ["done", "failed", "done"]
    assert "1.png" in done[1].report()["error"] and "\n" not in done[1].report()["error"]


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "read-only file system"), (errno.ENOSPC, "no space left")])
def test_a_disk_that_refuses_files_fails_every_image_in_one_line(
    restorer, images, tmp_path, refuse_new_files, number, words
):
    refuse_new_files(tmp_path / "out", number)
    done = restore_files(restorer, [images], tmp_path / "out", ONE_STEP)
    assert [outcome.status for outcome in done] == ["failed"] * 3
    assert all(words in outcome.report()["error"] for outcome in done)
    assert not list((tmp_path / "out").iterdir())


def test_values_that_are_not_finite_fail_their_image_alone(restorer, images, tmp_path):
    class Broken(Session):
        inputs, outputs, provider = ("latent",), ("image",), "broken"
        runs = 0

        def compute(self, **arrays):
            Broken.runs += 1
            image = np.zeros((1, 3, *(8 * side for side in arrays["latent"].shape[-2:])), np.float32)
            return {"image": image * np.float32("nan" if Broken.runs == 2 else 0)}

    engine = Restorer(restorer.manifest, {**restorer.sessions, "decoder": Broken()}, "torch")
    done = restore_files(engine, [images], tmp_path / "out", ONE_STEP)
    assert [outcome.status for outcome in done] == ["done", "failed", "done"]
    assert "not finite" in done[1].report()["error"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0_restored.png", "2_restored.png"]


SHORT = {"iterations": 1, "batch": 1, "device": "cpu"}


def test_two_processes_learn_the_same_person(nano_base, images, tmp_path, monkeypatch):
    config = PersonalizeConfig.for_base(nano_base.config, SHORT, pool=2, framing="none")
    target, saved = tmp_path / "alice.safetensors", Identity.save
    checkpoint, crops = training_files(target)

    def overtaken(identity, path, passphrase):  # the faster process has written the identity and removed its work files
        saved(identity, path)
        checkpoint.unlink()
        shutil.rmtree(crops)
        return saved(identity, path)

    monkeypatch.setattr(Identity, "save", overtaken)
    personalize("alice", [images], nano_base, config, target)
    assert Identity.load(target).name == "alice" and not checkpoint.exists() and not crops.exists()


def test_a_full_disk_during_learning_keeps_the_old_identity(nano_base, images, tmp_path, full_disk):
    config = PersonalizeConfig.for_base(nano_base.config, SHORT, pool=2, framing="none")
    target = tmp_path / "alice.safetensors"
    target.write_bytes(b"an older identity")
    with pytest.raises(PFStorerError, match="no space left"):
        personalize("alice", [images], nano_base, config, target)
    assert target.read_bytes() == b"an older identity"
