import errno
import hashlib
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# `kernels` and `export` are folders of the checkout, and `kernels` is also a package that diffusers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs like this; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported: without a GPU they run in the interpreter


@pytest.fixture(autouse=True)
def signals():
    """The handlers of signals are set back after each test: a command in this process leaves its own."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory):
    """A data directory for the tests, so that a user's identities are not used."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PFSTORER_HOME", str(home))
        yield home


@pytest.fixture(scope="session", autouse=True)
def kept_graphs():
    """Traced graphs, half a minute for a nano denoiser, are kept between runs. `make clean` removes them."""
    from pfstorer_rt import files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "graph_folder", lambda: ROOT / ".cache" / "graphs")
        yield


@pytest.fixture
def own_graphs(monkeypatch, tmp_path):
    """An empty folder for the traced graphs of one test."""
    folder = tmp_path / "graphs"
    monkeypatch.setattr("pfstorer_rt.files.graph_folder", lambda: folder)
    return folder


@pytest.fixture
def without_gpu(monkeypatch):
    """A machine without a GPU: PyTorch finds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def without_dlib(monkeypatch):
    """An installation without the package dlib of the extra `metrics`."""
    for name in ("dlib", "_dlib_pybind11"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def full_disk():
    """Every fsync fails as on a full disk, until `full_disk.undo()`."""

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield patch


@pytest.fixture
def set_free_space(monkeypatch):
    """Function (bytes): every disk has this much free space."""

    def set_bytes(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    return set_bytes


@pytest.fixture
def unprivileged():
    """Run without root's permissions, so that files and folders of other users are refused."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nobody
    yield
    if root:
        os.seteuid(0)


def sample_image(height, width, seed=0):
    """A smooth colourful image with edges and a little noise, (H, W, 3) float32 in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [np.sin((1 + c) * x / 17 + seed) * np.cos((2 + c) * y / 23) / 3 + 0.5 for c in range(3)]
    pixels = np.stack(planes, -1) + 0.2 * ((x // 16 + y // 16) % 2)[..., None] - 0.1
    return np.clip(pixels + rng.normal(0, 0.02, pixels.shape), 0, 1).astype(np.float32)


@pytest.fixture(scope="session")
def make_image():
    return sample_image


@pytest.fixture(scope="session")
def face():
    """A real face, (256, 256, 3) float32 in [0, 1]: scikit-image's astronaut."""
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[:256, 96:352] / 255).astype(np.float32)


@pytest.fixture(scope="session")
def noisy():
    """Function (pixels, sigma) -> the image with gaussian noise."""

    def add(pixels, sigma):
        noise = np.random.default_rng(3).normal(0, sigma, pixels.shape)
        return np.clip(pixels + noise, 0, 1).astype(np.float32)

    return add


@pytest.fixture(scope="session")
def nano_base():
    from pfstorer_rt.models.base import build_base

    return build_base("nano", seed=0)


@pytest.fixture(scope="session")
def nano_base_dir(nano_base, tmp_path_factory):
    """The same base on disk, in fp32, so that it has the fingerprint of `nano_base`."""
    return nano_base.save(tmp_path_factory.mktemp("bases") / "nano")


@pytest.fixture(scope="session")
def make_nano_identity(nano_base, tmp_path_factory):
    """Function (gammas=..., **PersonalizeConfig fields) -> Identity with random gammas, as if trained."""
    from PIL import Image

    from pfstorer_rt.config import PersonalizeConfig
    from pfstorer_rt.training.objectives import DreamBoothObjective, PersonalizationObjective
    from pfstorer_rt.training.personalize import make_identity

    pixels = sample_image(80, 72, seed=5)
    path = tmp_path_factory.mktemp("references") / "reference.png"
    Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
    photo = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def make(name="alice", gammas=(1.0, 1.0, 1.0, 1.0), seed=1, **settings):
        config = replace(PersonalizeConfig(), **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if config.method == "dreambooth":
                objective = DreamBoothObjective(nano_base, config)
            else:
                objective = PersonalizationObjective(nano_base, config)
                with torch.no_grad():
                    for block, scale in zip(objective.blocks, gammas, strict=True):
                        block.gamma.copy_(scale * torch.randn(block.gamma.shape))
        return make_identity(name, objective, nano_base, config, [path], [photo])

    return make


@pytest.fixture(scope="session")
def nano_identity(make_nano_identity):
    """An identity whose second gamma is zero, so that its plan has one block less."""
    return make_nano_identity(gammas=(1.5, 0.0, 1.5, 1.5))


@pytest.fixture(scope="session")
def exported_once(nano_base, tmp_path_factory):
    """Function (identity or None, base=nano, precision="fp32") -> its ONNX plan, exported by one test process for all.

    The caller may write into the file of the plan: it is a copy.
    """
    from filelock import FileLock
    from pfstorer_rt.export import export_plan

    from pfstorer_rt.config import to_json
    from pfstorer_rt.plan import Plan

    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def export(identity=None, base=nano_base, precision="fp32"):
        content = [base.fingerprint, to_json(base.config), precision]
        content += [] if identity is None else [identity.fingerprint, *sorted(identity.metadata().items())]
        first = shared / f"{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.plan"
        with FileLock(first.with_suffix(".lock")):
            if not first.exists():
                export_plan(first, identity, base, precision=precision)
        own = tmp_path_factory.mktemp("plans") / f"{identity.name if identity else 'base'}.plan"
        shutil.copyfile(first, own)
        return Plan.open(own)

    return export


@pytest.fixture(scope="session")
def nano_plan(exported_once, nano_identity):
    return exported_once(nano_identity)


@pytest.fixture(scope="session")
def base_plan(exported_once):
    return exported_once()


@pytest.fixture(scope="session")
def settings():
    """The settings of an identity trained with the defaults, as JSON values."""
    import json

    from pfstorer_rt.config import PersonalizeConfig

    return json.loads(json.dumps(asdict(PersonalizeConfig())))
