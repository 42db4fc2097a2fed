"""A disk that is too small for the temporary files of a large image is found before the first tile."""

import weakref
from dataclasses import replace

import numpy as np
import pytest

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.imaging import rows
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.imaging.rows import Spool, from_pixels
from pfstorer_rt.runtime.batch import BatchConfig, restore_files
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.runtime.selection import Area, Selection

ONE_STEP = RestoreConfig(steps=1)


@pytest.fixture
def personal(nano_base, nano_identity):
    with Restorer.from_base(nano_base, nano_identity, device="cpu") as made:
        yield made


@pytest.fixture
def few_pixels(monkeypatch):
    """Images of more than 100 x 100 pixels are too large for the memory."""
    monkeypatch.setattr(rows, "IN_MEMORY", 3 * 4 * 100 * 100)


def test_an_image_without_space_fails_before_its_first_tile_and_the_next_is_restored(
    personal, few_pixels, set_free_space, make_image, tmp_path
):
    (tmp_path / "in").mkdir()
    for number, side in enumerate((64, 160, 64)):
        save_image(tmp_path / "in" / f"{number}.png", make_image(side, side, number))
    set_free_space(3 * 4 * 160 * 160 - 1)
    steps = []
    done = restore_files(
        personal,
        [tmp_path / "in"],
        tmp_path / "out",
        BatchConfig(ONE_STEP),
        on_step=lambda job, count, total: steps.append((job.source.name, count)),
    )
    assert [outcome.status for outcome in done] == ["done", "failed", "done"]
    error = done[1].report()["error"]
    assert error.startswith("the temporary files of this image need 1 MB") and "TMPDIR" in error
    assert ("1.png", 0) in steps and ("1.png", 1) not in steps, "no tile was computed"
    set_free_space(3 * 4 * 160 * 160)
    assert restore_files(personal, tmp_path / "in" / "1.png", tmp_path / "out", BatchConfig(ONE_STEP))[0].error is None


def test_a_tmpdir_that_does_not_exist_is_named_and_python_does_not_use_another_folder(
    personal, few_pixels, make_image, monkeypatch, tmp_path
):
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/none")
    save_image(tmp_path / "a.png", make_image(160, 160))
    (failed,) = restore_files(personal, tmp_path / "a.png", tmp_path / "out", BatchConfig(ONE_STEP))
    assert str(failed.error).startswith(f"TMPDIR is '{tmp_path}/none', expected a folder")


CASES = {
    "tiles": ({}, False),
    "squares": ({"tile": TileConfig("parity", chop=128, chop_stride=96)}, False),
    "coarse to fine": ({"coarse": "on"}, False),
    "one person of several": ({}, True),
    "one person of several, coarse to fine": ({"coarse": "on", "scale": 1.5}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_space_that_is_checked_is_the_space_that_is_used(personal, few_pixels, make_image, monkeypatch, name):
    settings, several = CASES[name]
    sizes, peak, made = {}, [0], Spool.__init__

    def recorded(spool, height, width, *more, **others):
        made(spool, height, width, *more, **others)
        if size := rows.spooled_bytes(height, width):
            sizes[id(spool)] = size
            weakref.finalize(spool, sizes.pop, id(spool))
            peak[0] = max(peak[0], sum(sizes.values()))

    source = Spool.of(from_pixels(make_image(200, 400)))
    config = replace(ONE_STEP, **settings)
    chosen = Selection(200, 400, (Area(40, 40, 40, 40),)) if several else None
    passes = replace(personal.passes(source, config), selection=chosen)
    monkeypatch.setattr(Spool, "__init__", recorded)
    result = personal.restore_rows(source, config, passes=passes)
    assert np.isfinite(result.read(0, 1)).all()
    assert 0.7 * passes.temporary_bytes <= peak[0] <= passes.temporary_bytes
