"""Hostile checkpoints: slow or large pickles are refused quickly, in one line."""

import time

import pytest
import torch

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.models.stablesr.checkpoint import read_checkpoint


class Encoded:
    """Pickled as a call of `_codecs.encode`, as Python pickles bytes."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        import _codecs

        return _codecs.encode, self.arguments


def checkpoint(path, **extra):
    torch.save({"state_dict": {"a": torch.ones(2)}, **extra}, path)
    return path


def test_bytes_in_a_checkpoint_are_read(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", note=Encoded("caf\xe9", "latin1"))
    assert read_checkpoint(path)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("encoding", ["punycode", "idna", "zlib_codec", "x\n\x1b[2J", 7])
def test_text_in_another_encoding_is_refused_at_once(tmp_path, encoding):
    path = checkpoint(tmp_path / "a.ckpt", note=Encoded("\u4e2d\u0101" * 100_000, encoding))
    started = time.monotonic()
    with pytest.raises(BadFileError) as caught:
        read_checkpoint(path)
    assert time.monotonic() - started < 2
    assert len(str(caught.value)) < 400 and "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
