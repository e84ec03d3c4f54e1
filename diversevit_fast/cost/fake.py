"""A model without memory, on a device that need not be there.

Tensors are PyTorch's fake tensors: shapes, strides, dtypes and a device, no numbers. A step on them runs the library's
Python and PyTorch's autograd as they are.

Of a GPU that is not there C++ must not know everything: autograd's engine asks the driver for the streams of the
devices that its graph mentions, and autocast looks at the device of each operand. ``Disguise`` answers both: graphs
are recorded for the device ``meta``, and operands of autocast are on the GPU.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from diversevit_kernels.common.torch_internals import without_modes

from .._torch_internals import own_buffers, own_parameters, tree_leaves
from ..errors import UnsupportedError
from .torch_internals import device_of_fake, inside_autocast

_META = torch.device("meta")


class Disguise:
    """What C++ is told of the device of fake tensors; each question passes through a dispatch mode.

    Args:
        device: ``"cpu"`` or ``"cuda"``, where all tensors are.
    """

    def __init__(self, device: str):
        self.device = torch.device(device)
        self._gpu = self.device.type == "cuda"
        self._fresh: list[Tensor] = []
        # by identity, the nodes of leaves that nothing was computed of yet
        self._leaves: dict[int, Any] = {}
        self.autocast = False  # whether it is on where Python last called PyTorch: see ``sdpa``

    def device_of(self, x: Tensor) -> torch.device:
        """The answer to a question of C++.

        While an operator runs whose operands autocast has looked at, what asks for the device of a tensor that was
        just made is the graph that it becomes part of; of any other tensor, autocast.
        """
        if not self._gpu or device_of_fake(x).type != "cuda":
            return device_of_fake(x)
        if self.autocast and inside_autocast("cuda"):
            for i, made in enumerate(self._fresh):
                if made is x:
                    del self._fresh[i]
                    return _META
            return device_of_fake(x)
        return _META

    def device_for(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an operator, on the device itself where C++ took the answer above for it."""
        if self._gpu and kwargs.get("device") == _META:
            return {**kwargs, "device": self.device}
        return kwargs

    def leaf(self, x: Tensor) -> None:
        """Make the node of a leaf, for which autograd asks for its device, before autocast looks at the leaf."""
        before, self.autocast = self.autocast, False
        with torch.enable_grad():
            self._leaves[id(x)] = get_gradient_edge(x)
        self.autocast = before

    def made(self, args: Any, results: Any) -> None:
        """Note the results of an operator, if autograd records it."""
        if not self._gpu:
            return
        self._fresh = []
        operands = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        for x in operands:  # their nodes are now part of a graph
            self._leaves.pop(id(x), None)
        if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
            self._fresh = [x for x in tree_leaves(results) if isinstance(x, Tensor)]


def refuse_value(x: Tensor, phase: str | None) -> Any:
    """The value of a fake tensor that somebody asks for: that logits are finite, and the number of an optimizer's step.

    Raises:
        UnsupportedError: anything else.
    """
    if phase in (None, "optimizer"):
        return 1.0
    if x.dtype == torch.bool and phase == "penalty":
        return True
    raise needs_values("it reads the value of a tensor (.item(), or an if on one)")


def needs_values(reason: str) -> UnsupportedError:
    """The refusal of a model that cannot run on tensors without memory."""
    return UnsupportedError(
        f"model: cannot run on tensors without memory: {reason}; what it costs has to be measured"
    )


def without_memory(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` on ``device`` whose parameters and buffers have no memory; to be called in a fake mode.

    Parameters may be on any device, ``meta`` included. Tensors that modules share stay shared.
    """
    memo: dict[int, Any] = {}
    kept = []
    for module in model.modules():
        held = *own_parameters(module).values(), *own_buffers(module).values()
        for x in (*held, *vars(module).values()):
            if isinstance(x, Tensor) and id(x) not in memo:
                kept.append(x)
                memo[id(x)] = _like(x, device)
    with without_modes():  # what else a module holds is copied as it is
        return copy.deepcopy(model, memo)


def _like(x: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(made, requires_grad=x.requires_grad)
    return made.requires_grad_(x.requires_grad) if x.is_leaf else made
