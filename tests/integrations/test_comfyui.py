"""The ComfyUI nodes against the interface of a node: inputs, outputs, function, category, and tensors."""

import importlib.util
import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.identity import Identity, identity_path
from pfstorer_rt.runtime.restorer import Restorer

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
spec = importlib.util.spec_from_file_location("comfyui_nodes", FOLDER / "__init__.py")
nodes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nodes)
NODES = nodes.NODE_CLASS_MAPPINGS


@pytest.mark.parametrize("name", NODES)
def test_a_node_has_the_interface(name):
    node = NODES[name]
    inputs = {key for group in node.INPUT_TYPES().values() for key in group}
    assert set(inspect.signature(getattr(node, node.FUNCTION)).parameters) - {"self"} == inputs
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == 1 and node.CATEGORY == "PFStorer"
    assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS


def test_the_workflow_fits_the_nodes():
    workflow = json.loads((FOLDER / "restore.json").read_text())
    for step in workflow.values():
        if step["class_type"] in NODES:
            node = NODES[step["class_type"]]
            assert set(step["inputs"]) == set(node.INPUT_TYPES()["required"])
            for key, value in step["inputs"].items():
                source = NODES.get(workflow[value[0]]["class_type"]) if isinstance(value, list) else None
                assert source is None or source.RETURN_TYPES[value[1]] == node.INPUT_TYPES()["required"][key][0]


def test_restoring_a_batch_equals_the_library(nano_base_dir, make_image):
    (restorer,) = nodes.LoadPerson().load(str(nano_base_dir), "")
    batch = torch.from_numpy(np.stack([make_image(64, 56, seed=i) for i in range(2)]))
    (result,) = nodes.Restore().restore(restorer, batch, 1.0, 5, 2, 2.0)
    assert result.shape == (2, 128, 112, 3) and result.min() >= 0 and result.max() <= 1
    with Restorer.from_base(nano_base_dir) as expected:
        one = expected.restore(batch[1].numpy(), RestoreConfig(steps=2, seed=5, scale=2.0))
    assert np.array_equal(result[1].numpy(), one)


def test_learning_needs_consent_and_stores_the_person(nano_base, tmp_path, monkeypatch, make_image, without_dlib):
    from pfstorer_rt.models.base import build_base

    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    config = replace(nano_base.config, personalize={"iterations": 1, "batch": 1, "pool": 2})
    base = str(build_base(config, seed=0).save(tmp_path / "base"))
    photographs = torch.from_numpy(np.stack([make_image(64, 64, seed=i) for i in range(3)]))
    with pytest.raises(ValueError, match="consent is missing"):
        nodes.Learn().learn(photographs, "bob", base, False)
    assert nodes.Learn().learn(photographs, "bob", base, True) == ("bob",)
    assert len(Identity.load(identity_path("bob")).references) == 3
    with pytest.raises(ValueError, match="known already"):
        nodes.Learn().learn(photographs, "bob", base, True)
