import numpy as np
import pytest

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.runtime.forecast import Forecaster
from pfstorer_rt.runtime.restorer import Restorer


@pytest.fixture(scope="module")
def forecaster(nano_base):
    with Restorer.from_base(nano_base, device="cpu") as restorer:
        yield Forecaster(restorer, RestoreConfig(steps=2, tile=TileConfig(batch=2)))


def test_the_report_of_a_forecast_has_the_layout_of_the_restoration(forecaster):
    facts, layout = forecaster.predict(300, 200).facts(), forecaster.restorer.layout(300, 200, forecaster.config)
    assert layout.facts().items() <= facts.items()
    assert (facts["tiles"], facts["batch"], facts["steps"], facts["squares"]) == (7 * 5, 2, 2, 1)


def test_a_forecast_costs_one_step_at_scale_1_whatever_it_predicts(nano_base, monkeypatch):
    with Restorer.from_base(nano_base, device="cpu") as restorer:
        seen, restore = [], restorer.restore_rows
        monkeypatch.setattr(
            restorer, "restore_rows", lambda rows, config, *more: seen.append(config) or restore(rows, config, *more)
        )
        made = Forecaster(restorer, RestoreConfig(steps=50, scale=8, tile=TileConfig(batch=1)))
        assert {(config.steps, config.scale) for config in seen} == {(1, 1.0)}
        large, one = made.predict(64, 64), Forecaster(restorer, RestoreConfig(steps=1)).predict(64, 64)
    assert large.passes.fine.canvas.height == 512 and large.seconds > 50 * one.seconds


def test_time_grows_with_the_tiles(forecaster):
    small, large = forecaster.predict(512, 512), forecaster.predict(5120, 5120)
    ratio = large.passes.fine.denoiser_tiles / small.passes.fine.denoiser_tiles
    assert small.seconds > 0 and large.seconds / small.seconds == pytest.approx(ratio, rel=0.5)


def test_memory_grows_by_few_bytes_per_pixel(forecaster):
    sides = np.array([4000, 8000, 16000])
    peaks = np.array([forecaster.predict(side, side).peak_bytes for side in sides])
    more = np.diff(peaks) / np.diff(sides.astype(np.int64) ** 2)
    # 4 for Pillow, 2 for the latents of a nano base; an image of floats alone would be 12.
    assert (more > 2).all() and (more < 9).all()
