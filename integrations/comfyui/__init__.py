"""ComfyUI nodes of the PFStorer runtime: open a plan or a base, restore, and learn a person.

ComfyUI's images are tensors (B, H, W, 3) in [0, 1]. Put this folder into `custom_nodes`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

CATEGORY = "PFStorer"


class LoadPlan:
    """Opens a plan file."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("PFSTORER",), ("restorer",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of the node."""
        return {"required": {"plan": ("STRING", {"default": "alice.plan"})}}

    def load(self, plan: str) -> tuple[Any]:
        """Return the restorer of a plan."""
        from pfstorer_rt import Restorer

        return (Restorer.from_plan(plan),)


class LoadPerson:
    """Opens a base with a stored identity in PyTorch."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("PFSTORER",), ("restorer",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of the node; an empty person selects the base alone."""
        return {"required": {"base": ("STRING", {"default": "portrait"}), "person": ("STRING", {"default": ""})}}

    def load(self, base: str, person: str) -> tuple[Any]:
        """Return the restorer of a base and a person."""
        from pfstorer_rt import Restorer

        return (Restorer.from_base(base, person or None),)


class Restore:
    """Restores a batch of images."""

    CATEGORY, FUNCTION = CATEGORY, "restore"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of the node; 0 steps select the default."""
        return {
            "required": {
                "restorer": ("PFSTORER",),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.5, "step": 0.05}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "scale": ("FLOAT", {"default": 1.0, "min": 1.0, "max": 4.0, "step": 0.5}),
            }
        }

    def restore(
        self, restorer: Any, image: torch.Tensor, strength: float, seed: int, steps: int, scale: float
    ) -> tuple[torch.Tensor]:
        """Return the restored images, (B, H * scale, W * scale, 3) in [0, 1]."""
        from pfstorer_rt import RestoreConfig

        config = RestoreConfig(steps=steps or None, seed=seed, strength=strength, scale=scale)
        results = [restorer.restore(pixels[..., :3].cpu().float().clamp(0, 1).numpy(), config) for pixels in image]
        return (torch.stack([torch.from_numpy(result) for result in results]),)


class Learn:
    """Learns a person from a batch of photographs, and stores the identity."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "learn", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("person",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of the node."""
        return {
            "required": {
                "photographs": ("IMAGE",),
                "person": ("STRING", {"default": "alice"}),
                "base": ("STRING", {"default": "portrait"}),
                "consent": ("BOOLEAN", {"default": False, "label_on": "the person agreed", "label_off": "no consent"}),
            }
        }

    def learn(self, photographs: torch.Tensor, person: str, base: str, consent: bool) -> tuple[str]:
        """Return the name of the stored identity; raises `ValueError` without consent or for a used name."""
        from pfstorer_rt import personalize
        from pfstorer_rt.identity import named_identity
        from pfstorer_rt.imaging.files import save_image

        if not consent:
            raise ValueError("consent is missing: an identity is biometric data; ask the person first")
        if named_identity(person).exists():
            raise ValueError(f"{person}: this person is known already; choose another name")
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.png" for number in range(len(photographs))]
            for path, pixels in zip(paths, photographs, strict=True):
                save_image(path, pixels[..., :3].cpu().float().numpy())
            return (personalize(person, paths, base).name,)


NODE_CLASS_MAPPINGS = {
    "PFStorerLoadPlan": LoadPlan,
    "PFStorerLoadPerson": LoadPerson,
    "PFStorerRestore": Restore,
    "PFStorerLearn": Learn,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PFStorerLoadPlan": "PFStorer: load a plan",
    "PFStorerLoadPerson": "PFStorer: load a person",
    "PFStorerRestore": "PFStorer: restore",
    "PFStorerLearn": "PFStorer: learn a person",
}
