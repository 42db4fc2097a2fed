"""Calls of `export` that are refused before any work; tests/export checks its plans."""

import gc
import sys

import pytest

from pfstorer_rt.cli.imports import fast_imports


def test_export_refuses_an_existing_output(run, tree, tmp_path, nano_base_dir):
    (tmp_path / "a.plan").write_bytes(b"precious")
    before = tree(tmp_path)
    done = run("export", "--base", nano_base_dir, "-o", tmp_path / "a.plan")
    assert done.status and len(done.errors) == 1 and "--overwrite" in done.errors[0] and tree(tmp_path) == before


def test_export_refuses_an_identity_of_another_base(refused, people, tmp_path, other_base_dir):
    wrong = ("export", "--identity", "alice", "--base", other_base_dir, "-o", tmp_path / "new" / "a.plan")
    refused(2, *wrong, words=["alice", "learned on base"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [("--identity", "nobody"), ("--base", "no-base"), ("--identity", "?"), ()])
def test_export_of_a_missing_identity_or_base_exits_with_2(run, people, tmp_path, arguments):
    done = run("export", *arguments, "-o", tmp_path / "a.plan")
    assert done.status == 2 and len(done.errors) == 1 and not (tmp_path / "a.plan").exists()


def test_export_makes_a_missing_folder_but_not_for_a_refused_export(run, people, tmp_path, nano_base_dir):
    target = tmp_path / "new" / "plans" / "a.plan"
    assert run("export", "--identity", "nobody", "--base", nano_base_dir, "-o", target).status == 2
    assert not target.parent.parent.exists()
    done = run("export", "--base", nano_base_dir, "-o", target)
    assert done.status == 0 and target.is_file()


@pytest.mark.parametrize("arguments", [("--identity", "nobody"), ("--base", "no-base")])
def test_a_missing_identity_or_base_is_refused_before_the_slow_imports(run, people, tmp_path, monkeypatch, arguments):
    for module in ("pfstorer_rt.export", "pfstorer_rt.engine.tensorrt"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "no such" in run("export", *arguments, "-o", tmp_path / "a.plan").errors[0]


def test_slow_imports_do_without_the_collector():
    try:
        with fast_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("output", ["plans/", "./"])
def test_export_to_a_folder_is_refused(refused, tmp_path, monkeypatch, nano_base_dir, output):
    monkeypatch.chdir(tmp_path)
    refused(2, "export", "--base", nano_base_dir, "-o", output, words=["not a file; give a file name"])
    assert not list(tmp_path.glob("plans*"))
