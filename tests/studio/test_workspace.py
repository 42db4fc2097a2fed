"""The private folder: what is taken, limits, and what is left at the end."""

from pathlib import Path

import pytest

from pfstorer_rt.errors import PFStorerError, SettingError
from pfstorer_rt.studio.config import Limits
from pfstorer_rt.studio.workspace import open_workspace


def test_the_end_deletes_everything_and_only_the_owner_reads_it():
    with open_workspace(Limits()) as workspace:
        folder = workspace.folder
        assert folder.stat().st_mode & 0o077 == 0
        (workspace.session("a").folder / "x.png").write_bytes(b"x")
    assert not folder.exists()


def test_a_closed_page_loses_its_files_and_addresses(workspace):
    one, other = workspace.session("one"), workspace.session("other")
    names = []
    for session in (one, other):
        (session.folder / "x.png").write_bytes(b"x")
        names.append(workspace.publish(session.folder / "x.png").removeprefix("pictures/"))
    workspace.close("one")
    assert not one.folder.exists() and workspace.published(names[0]) is None
    assert workspace.published(names[1]) == other.folder / "x.png"


def test_files_outside_the_uploads_are_refused(workspace, session, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"x")
    link = workspace.uploads / "link.png"
    link.symlink_to(secret)
    for path in (secret, link, Path("/etc/passwd")):
        with pytest.raises(SettingError, match="not a file that was dropped"):
            workspace.take([str(path)], session.folder / "inputs")


def test_limits(workspace, session, drop, make_image):
    with pytest.raises(SettingError, match="6 pictures: expected at most 5"):
        workspace.take(drop(*"abcdef"[:0]) + ["x"] * 6, session.folder / "inputs")
    big = workspace.uploads / "big.png"
    big.write_bytes(bytes(2 << 20))
    with pytest.raises(SettingError, match="2 MB, expected at most 1 MB"):
        workspace.take([str(big)], session.folder / "inputs")
    (wide,) = drop("wide.png", pixels=make_image(10, 10).repeat(80, 0).repeat(60, 1))
    with pytest.raises(PFStorerError, match="800"):
        workspace.check_pixels(Path(wide))


def test_files_of_one_name_keep_apart(workspace, session, drop):
    files = drop("a.png", seed=1) + drop("a.png", seed=2)
    taken = workspace.take(files, session.folder / "inputs")
    assert [path.name for path in taken] == ["a.png", "a_2.png"]
    assert [path.read_bytes() for path in taken] == [Path(file).read_bytes() for file in files]
