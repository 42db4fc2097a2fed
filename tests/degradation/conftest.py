import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: for small images several threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def face():
    """A real image, (3, 192, 192) in [0, 1]: the face in scikit-image's astronaut."""
    from skimage.data import astronaut

    crop = Image.fromarray(astronaut()[0:220, 115:335]).resize((192, 192), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
