"""Optimizers of the trainings: AdamW, its versions with 8-bit state, and Muon."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.extras import install
from pfstorer_rt.training.device import has_native_bf16

ParameterGroup = dict[str, Any]
"""`params`, and optimizer settings of this group, such as `lr`; `clip` False leaves its gradient unlimited."""
MUON_RATE, MOMENTUM = 10.0, 0.9
"""Learning rate of Muon as a multiple of AdamW's, and its momentum, for trainings of a few hundred iterations."""
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
"""Coefficients of Jordan et al. for x, x^3 and x^5: the largest slope at 0."""


def make_optimizer(
    parameters: Iterable[nn.Parameter] | list[ParameterGroup], config: TrainConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of the configuration.

    parameters: parameters, or groups with their own settings. Raises `MissingBackendError` if an 8-bit optimizer is
    asked for without bitsandbytes.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": (0.9, 0.999)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if config.optimizer == "muon":
        groups = as_groups(parameters)
        return MuonForMatrices(groups, settings, fast_type(groups, config))
    try:
        optim = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise MissingBackendError(
            f"optimizer {config.optimizer} needs bitsandbytes ({error}): {install('gpu')}"
        ) from error
    kind = optim.AdamW8bit if config.optimizer == "adamw8bit" else optim.PagedAdamW8bit
    return kind(parameters, **settings)


def fast_type(groups: list[ParameterGroup], config: TrainConfig) -> torch.dtype:
    """Return the type for products of matrices: bf16 if the device has instructions for it and the training allows it.

    Muon's own implementation uses bf16.
    """
    if config.precision not in ("auto", "bf16"):
        return torch.float32
    cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    return torch.bfloat16 if has_native_bf16(cpu) else torch.float32


def as_groups(parameters: Iterable[nn.Parameter] | list[ParameterGroup]) -> list[ParameterGroup]:
    """Return parameter groups; plain parameters become one group."""
    groups: list[Any] = list(parameters)
    return groups if groups and isinstance(groups[0], dict) else [{"params": groups}]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), for matrices and convolutions.

    A convolution (O, I, kh, kw) is a matrix (O, I kh kw). The update of a matrix is the nearest matrix with orthonormal
    rows or columns to its averaged gradient. Few iterations then change all directions of the matrix, and not only
    those with large gradients. `torch.optim.Muon` computes each matrix alone; here all matrices of a shape are one
    batch, which is faster for the small matrices of the blocks.
    """

    def __init__(self, groups: list[ParameterGroup], dtype: torch.dtype = torch.float32) -> None:
        """groups: parameter groups with `lr` and `weight_decay`. dtype: type in which updates are orthogonalized."""
        super().__init__(groups, {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do one step; closure: None."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault((len(matrix), matrix[0].numel()), []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                ahead = torch.stack([self.look_ahead(matrix).flatten(1) for matrix in matrices])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, update in zip(matrices, orthogonalized(ahead, self.dtype), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update.view(matrix.shape), alpha=rate)

    def look_ahead(self, matrix: torch.Tensor) -> torch.Tensor:
        """Update the averaged gradient of a matrix and return it with Nesterov's momentum."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        average: torch.Tensor = state["average"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(average, MOMENTUM)


def orthogonalized(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return about the nearest matrices with orthonormal rows or columns, fp32, to matrices (B, rows, columns).

    Five steps of a Newton-Schulz iteration, computed in `dtype`, bring all singular values that are not tiny to 0.7 to
    1.2.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).float()
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=linear)
    return (x if wide else x.mT).float()


class MuonForMatrices(torch.optim.Optimizer):
    """Muon for matrices and convolutions, AdamW for all other parameters, such as vectors."""

    def __init__(
        self, groups: list[ParameterGroup], settings: dict[str, Any], dtype: torch.dtype = torch.float32
    ) -> None:
        """groups: parameter groups. settings: of AdamW, for groups without their own. dtype: as in `Muon`."""
        matrices, others = [], []
        for group in groups:
            group = {**settings, **group}
            own = [p for p in group["params"] if is_matrix(p)]
            matrices.append({**group, "lr": group["lr"] * MUON_RATE, "params": own})
            others.append({**group, "params": [p for p in group["params"] if not is_matrix(p)]})
        matrices, others = ([group for group in part if group["params"]] for part in (matrices, others))
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, dtype))
        if others:
            self.parts.append(torch.optim.AdamW(others))
        super().__init__([*matrices, *others], {})
        self._link()

    def _link(self) -> None:
        """Use the groups of the parts as the groups of this optimizer, so that a changed learning rate has effect."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do one step of both optimizers; closure: None."""
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both optimizers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both optimizers."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._link()


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or a convolution, with several rows and columns."""
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) > 1
