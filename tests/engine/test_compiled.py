"""The cache of compiled networks, with the optimized graphs of ONNX Runtime."""

import stat
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from pfstorer_rt.engine import onnxruntime as ort_engine
from pfstorer_rt.engine.compiled import ENGINES, cache_folder, make_cache_folder
from pfstorer_rt.engine.session import open_session
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.plan import COMPONENTS, Plan
from pfstorer_rt.runtime.identities import find_kept
from pfstorer_rt.runtime.restorer import Restorer


@pytest.fixture(scope="module")
def plan(exported_once, nano_identity):
    return exported_once(nano_identity, precision="int8")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def loads(monkeypatch):
    """One word for each load of a graph: `saved` into the cache, read from it as `optimized`, or `plain`."""
    words = []

    class Counted(ort_engine.OnnxRuntimeSession):
        def __init__(self, *arguments, optimized=False, save=None, **options):
            words.append("optimized" if optimized else "saved" if save else "plain")
            super().__init__(*arguments, optimized=optimized, save=save, **options)

    monkeypatch.setattr(ort_engine, "OnnxRuntimeSession", Counted)
    return words


def opened(plan, component="encoder"):
    open_session(plan, component, "onnxruntime", "cpu").close()


def folder_of(plan):
    return cache_folder("onnxruntime", plan.manifest.identity_fingerprint)


def only_entry(plan):
    (entry,) = folder_of(plan).iterdir()
    return entry


@pytest.mark.parametrize("engine", ENGINES)
def test_there_is_no_cache_behind_a_symbolic_link(home, tmp_path, engine):
    plan = SimpleNamespace(manifest=SimpleNamespace(identity_fingerprint=None, base_fingerprint="0" * 64))
    folder = make_cache_folder(engine, plan)
    assert folder.is_relative_to(home / "cache") and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert make_cache_folder(engine, plan) is None


def test_the_second_opening_reads_the_optimized_graph(home, plan, loads):
    opened(plan)
    entry = only_entry(plan)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600 and stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    written = entry.stat()
    opened(plan)
    assert loads == ["saved", "optimized"] and only_entry(plan).stat().st_mtime_ns == written.st_mtime_ns


def test_a_restoration_is_the_same_with_and_without_the_cache(home, plan, loads, monkeypatch):
    image = np.random.default_rng(0).random((90, 130, 3), np.float32)

    def restored():
        with Restorer.from_plan(plan.path, "onnxruntime", provider="cpu") as restorer:
            return restorer.restore(image)

    found = [restored(), restored()]
    monkeypatch.setattr(ort_engine, "make_cache_folder", lambda *_: None)
    expected = restored()
    assert loads == ["saved"] * 3 + ["optimized"] * 3 + ["plain"] * 3
    assert all(np.array_equal(image, expected) for image in found)


@pytest.mark.parametrize("damage", ["cut off", "changed", "no graph", "of another component", "a link"])
def test_a_damaged_entry_is_replaced(home, plan, loads, damage, tmp_path):
    opened(plan)
    entry = only_entry(plan)
    good = entry.read_bytes()
    changed = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    entry.write_bytes(good[:-100] if damage == "cut off" else changed)
    if damage == "of another component":
        opened(plan, "decoder")
        (other,) = {*folder_of(plan).iterdir()} - {entry}
        other.rename(entry)
        loads.pop()
    if damage == "a link":
        (tmp_path / "precious").write_bytes(b"precious")
        entry.unlink()
        entry.symlink_to(tmp_path / "precious")
    if damage == "no graph":  # its digest fits, but ONNX Runtime cannot load it
        ort_engine.write_entry(entry, b"no graph")
    for _ in range(2):
        opened(plan)
    assert loads == ["saved", *["optimized"] * (damage == "no graph"), "saved", "optimized"]
    assert not entry.is_symlink() and (damage != "a link" or (tmp_path / "precious").read_bytes() == b"precious")


def test_another_runtime_or_processor_has_another_entry(home, plan, loads, monkeypatch):
    opened(plan)
    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    opened(plan)
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"found": ["NEON"]}})
    opened(plan)
    assert loads == ["saved"] * 3 and len(list(folder_of(plan).iterdir())) == 3


def test_every_component_has_an_entry(home, plan, loads):
    for component in COMPONENTS:
        opened(plan, component)
    assert len(list(folder_of(plan).iterdir())) == len(COMPONENTS) and set(loads) == {"saved"}


def test_graphs_of_other_precisions_have_no_entry(home, nano_plan, loads):
    """Their optimization takes no longer than reading an entry."""
    opened(nano_plan)
    assert loads == ["plain"] and not folder_of(nano_plan).exists()


def test_a_home_that_cannot_be_written_costs_only_time(home, plan, loads):
    home.touch()  # a file where the folder should be
    opened(plan)
    assert loads == ["plain"]


def test_a_full_disk_costs_only_time_and_leaves_nothing(home, plan, loads):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        opened(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loads == ["saved", "plain"] and not any(path.is_file() for path in home.rglob("*"))


def test_a_damaged_plan_is_refused_although_its_graph_is_in_the_cache(home, plan, tmp_path):
    opened(plan)
    copy = tmp_path / "copy.plan"
    data = bytearray(plan.path.read_bytes())
    data[data.index(b"encoder.onnx") + 2000] ^= 1
    copy.write_bytes(data)
    with pytest.raises(BadFileError, match="encoder"):
        opened(Plan.open(copy))


def test_the_entries_of_a_person_are_found_with_the_identity(home, plan, nano_identity):
    path = home / "identities" / "alice.safetensors"
    nano_identity.save(path)
    others = cache_folder("onnxruntime", plan.manifest.base_fingerprint)
    others.mkdir(parents=True)
    opened(plan)
    assert folder_of(plan) in find_kept("alice").files and others not in find_kept("alice").files
