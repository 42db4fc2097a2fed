import pytest
import torch

from pfstorer_rt.diffusion import Schedule
from pfstorer_rt.engine.session import Session
from pfstorer_rt.plan import COMPONENTS
from pfstorer_rt.runtime.restorer import Restorer


@pytest.fixture(scope="module")
def restorer(nano_base):
    with Restorer.from_base(nano_base, device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def personal(nano_base, nano_identity):
    with Restorer.from_base(nano_base, nano_identity, device="cpu") as made:
        yield made


class Counting(Session):
    """A session that records its inputs."""

    def __init__(self, session):
        self.session, self.calls = session, []
        self.inputs, self.outputs, self.provider = session.inputs, session.outputs, session.provider

    def compute(self, **arrays):
        self.calls.append({name: array.copy() for name, array in arrays.items()})
        return self.session.run(**arrays)


@pytest.fixture(scope="session")
def counting():
    """The class of sessions that record their inputs."""
    return Counting


@pytest.fixture
def counted(restorer):
    """The restorer with counting sessions, by component."""
    sessions = {name: Counting(session) for name, session in restorer.sessions.items()}
    return Restorer(restorer.manifest, sessions, "torch"), sessions


class Perfect(Session):
    """Lossless networks: the encoder moves pixels to channels, and the denoiser predicts the clean latent."""

    def __init__(self, component):
        self.component, self.provider = component, "test"
        self.inputs = {"encoder": ("image",), "denoiser": ("x", "t", "z_lq"), "decoder": ("latent",)}[component]
        self.outputs = {"encoder": ("mean",), "denoiser": ("prediction",), "decoder": ("image",)}[component]

    def compute(self, **arrays):
        a = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.component == "encoder":
            return {"mean": torch.nn.functional.pixel_unshuffle(a["image"], 8).numpy()}
        if self.component == "decoder":
            return {"image": torch.nn.functional.pixel_shuffle(a["latent"], 8).numpy()}
        abar = torch.from_numpy(Schedule().alphas_cumprod())[a["t"].long()][:, None, None, None]
        return {"prediction": ((a["x"] - abar.sqrt() * a["z_lq"]) / (1 - abar).sqrt()).float().numpy()}


@pytest.fixture
def perfect(restorer):
    return Restorer(restorer.manifest, {name: Perfect(name) for name in COMPONENTS}, "torch")
