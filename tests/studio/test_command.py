"""The command `studio` refuses wrong files before it serves a page."""

import pytest
from click.testing import CliRunner

from pfstorer_rt.cli.studio import command
from pfstorer_rt.errors import BadFileError, PFStorerError


@pytest.fixture
def call(monkeypatch):
    served = []
    monkeypatch.setattr("pfstorer_rt.studio.serving.serve", lambda config, on_ready: served.append(config))

    def run(*arguments):
        result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)
        return result.exception, served

    return run


def test_a_missing_base_is_refused(call):
    error, served = call("--base", "nosuch")
    assert isinstance(error, PFStorerError) and "nosuch" in str(error) and not served


def test_a_file_that_is_no_plan_is_refused(call, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no plan")
    error, served = call("--engine", tmp_path / "a.jpg")
    assert isinstance(error, BadFileError) and "a.jpg" in str(error) and not served


def test_right_files_are_served(call, nano_plan, nano_base_dir):
    error, served = call("--base", nano_base_dir, "--engine", nano_plan.path)
    assert error is None and served[0].plans == (nano_plan.path,)
