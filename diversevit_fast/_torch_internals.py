"""The private parts of PyTorch that this library uses; besides ``cost.torch_internals`` nothing else in it names one.

Each says what it tells and why no public call does. Each was tried on PyTorch 2.10.0 and 2.14.1 by
``tests/test_torch_internals.py``, those of FSDP2 by ``tests/attachment/test_systems.py``. The first ones
run at every call of an operator and are PyTorch's own functions, for a Python function around them would
cost as much as they do.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks  # pyright: ignore
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "ProxyTorchDispatchMode",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
]  # here as they are

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
"""Types of tensors that operators take as they are; fake ones stand for tensors with memory."""

functorch_active = torch._C._are_functorch_transforms_active
"""Whether a ``torch.func`` transform runs. There is no public way to ask."""

any_requires_grad = torch._C._any_requires_grad
"""Whether one of the arguments is a tensor that requires a gradient; a loop in Python is slower."""

dispatch_modes = torch._C._len_torch_dispatch_stack
"""How many ``TorchDispatchMode`` are entered. ``torch.utils`` publishes the mode, not its stack."""

profiler_enabled = torch.autograd._profiler_enabled
"""Whether a profiler records. A public profiler tells only of itself."""

tracing_state = torch._C._get_tracing_state
"""What ``torch.jit.trace`` writes into, or None; ``torch.jit.is_tracing`` asks through two more functions."""

dispatch_key_set = torch._C._dispatch_keys
"""A tensor's dispatch keys; ``raw_repr()`` has a bit for each: subclasses, vmapped, negated ... tensors have their own.

Public are only properties (``is_neg``, ``is_conj``), not all, and none of functorch's wrappers.
"""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context: operators skip autograd altogether, as PyTorch lets them inside a custom operator's function.
Under ``no_grad`` they still pass through it."""

function_modes = _get_current_function_mode_stack
"""The ``TorchFunctionMode`` entered, the outermost first. The stack is not published."""

frame_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore
"""Something callable where ``torch.compile`` runs Python between two of its graphs; there
``torch.compiler.is_compiling`` is False. A Python function around it would itself be compiled there."""

cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What ``F.scaled_dot_product_attention`` runs on a CPU. PyTorch's public flop counter does not know it."""

cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Its backward, which the counter does not know either."""

BatchNorm = _BatchNorm
"""The base of all batch norms, ``SyncBatchNorm`` among them. The public classes have no other in common."""


def default_device_mode() -> Any:
    """The ``TorchFunctionMode`` of ``torch.set_default_device``, or None. PyTorch keeps it below all others.

    It refuses to be left from any other place. That of ``with torch.device(...)`` is like others.
    """
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def insert_function_mode(mode: Any, place: int) -> None:
    """Enter a ``TorchFunctionMode`` below all but ``place`` of those entered; publicly it is entered above all."""
    above = [_pop_mode() for _ in function_modes()[place:]]
    for other in (mode, *reversed(above)):
        _push_mode(other)


def remove_function_mode(mode: Any) -> None:
    """Leave a ``TorchFunctionMode`` wherever it is; publicly the innermost is left, whichever that is."""
    entered = function_modes()
    place = next((i for i, other in enumerate(entered) if other is mode), len(entered))
    above = [_pop_mode() for _ in entered[place:]]
    for other in reversed(above[:-1]):
        _push_mode(other)


def in_forward_mode() -> bool:
    """Whether a forward-mode level is open (``torch.func.jvp``, ``forward_ad.dual_level``); public is to enter one."""
    return forward_ad._current_level >= 0


def overload_of(operator: torch.library.CustomOpDef) -> Any:
    """What compilers and dispatch modes see of a custom operator (``torch.ops.<namespace>.<name>.default``).

    ``torch.ops`` would look it up by the name, which is private too.
    """
    return operator._opoverload


def function_of_aten(overload: Any) -> Any:
    """One of PyTorch's operators without the Python function around it, which costs 0.4 us a call."""
    return overload._op


def function_of(operator: torch.library.CustomOpDef) -> Any:
    """The Python function that ``torch.library.custom_op`` was given, which it does not hand back."""
    return operator._init_fn


def name_of(operator: torch.library.CustomOpDef) -> str:
    """The operator's name without its namespace, which it was given and does not hand back."""
    return operator._name


def tensor_arguments(operator: torch.library.CustomOpDef) -> int:
    """How many of a custom operator's arguments are tensors or None; its schema is read by private names only."""
    return sum(
        "Tensor" in str(argument.type) for argument in overload_of(operator)._schema.arguments
    )


def node_class(function: type[torch.autograd.Function]) -> type:
    """The class of the graph nodes that ``function`` records. No node of its own tells which it is."""
    return function._backward_cls  # pyright: ignore[reportAttributeAccessIssue]


_DIFFERENTIABLE_ONCE = once_differentiable(lambda ctx: None).__code__


def is_differentiable_once(node: type) -> bool:
    """Whether graph nodes of this class are of a ``Function`` whose backward is marked ``once_differentiable``.

    The class of a node does not publish the ``Function`` that it is of, nor a mark whether it was marked.
    """
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _DIFFERENTIABLE_ONCE


def operator_node_name(operator: torch.library.CustomOpDef) -> str:
    """``name()`` of the graph nodes that a ``torch.library`` operator records."""
    overload = overload_of(operator)
    return f"GeneratedBackwardFor_{overload.namespace}_{overload._opname}_{overload._overloadname}Backward"


def place_in_graph(node: Any) -> int:
    """How many nodes were recorded on this thread before ``node``; of leaves a number above all. Not published."""
    return node._sequence_nr()


LEAF = 2**64 - 1
"""``place_in_graph`` of leaves."""


_FACTORS = {"MmBackward0": ("_raw_saved_self", 0), "AddmmBackward0": ("_raw_saved_mat1", 1)}


def saved_factor(node: Any) -> tuple[Any, Any] | None:
    """What the node of a product ``x @ w`` saved of x, to which hooks can be given, and the node that made x.

    None of other nodes, and where x was not saved since w has no gradient. The hooks of one saved tensor are public
    (``SavedTensor.register_hooks``), the names of saved tensors are not.
    """
    name, place = _FACTORS.get(node.name(), ("", 0))
    if not name or node.next_functions[place + 1][0] is None:
        return None
    return getattr(node, name), node.next_functions[place][0]


def will_run(node: Any) -> bool:
    """Whether the running backward pass executes this node of the graph.

    ``ctx.needs_input_grad`` says only whether an input has a gradient, be it asked for or not.

    Raises:
        RuntimeError: the node is a leaf that ``autograd.grad`` was asked for, or no backward pass runs.
    """
    return torch._C._will_engine_execute_node(node)


def backward_pass() -> int:
    """A number of the backward pass that runs, other than that of any before it; -1 outside of one."""
    return torch._C._current_graph_task_id()


def write_count(x: Tensor) -> int:
    """How often the tensor's memory was written to in place. Only autograd's errors mention it publicly."""
    return x._version


def checkpoint_frame() -> Any:
    """What ``torch.utils.checkpoint`` keeps of the non-reentrant checkpoint whose forward runs here, or None.

    It calls ``recompute_fn`` of this object to make again what it drops. Publicly its hooks cannot be looked at.
    """
    hooks: Any = _top_hooks(True)
    if hooks is None or not hooks[0].__qualname__.startswith("_checkpoint_hook."):
        return None
    variables = zip(hooks[0].__code__.co_freevars, hooks[0].__closure__, strict=True)
    return next(cell.cell_contents for name, cell in variables if name == "frame")


def checkpoint_frames() -> list[Any]:
    """``checkpoint_frame`` of every checkpoint whose forward runs here, the innermost first."""
    frame = checkpoint_frame()
    found = [] if frame is None else [frame]
    if _top_hooks(True) is None:
        return found
    with below_saved_tensors_hooks():
        return found + checkpoint_frames()


def saved_tensors_hooked() -> bool:
    """Whether somebody's ``saved_tensors_hooks`` are entered: a checkpoint's, ``save_on_cpu`` ..."""
    return _top_hooks(True) is not None


@contextmanager
def below_saved_tensors_hooks() -> Iterator[None]:
    """A context in which the innermost ``saved_tensors_hooks`` are not entered. Publicly only all can be disabled."""
    hooks = _top_hooks(True)
    torch._C._autograd._pop_saved_tensors_default_hooks()  # pyright: ignore
    try:
        yield
    finally:
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)  # pyright: ignore


def in_checkpoint(again: bool = False) -> bool:
    """Whether ``torch.utils.checkpoint`` drops what is saved for backward now; ``again``: or recomputes it."""
    hooks = _top_hooks(True) if again else None
    recomputes = hooks is not None and hooks[0].__qualname__.startswith("_recomputation_hook.")
    return recomputes or checkpoint_frame() is not None


def in_reentrant_checkpoint() -> bool:
    """Whether the forward of a reentrant checkpoint runs here. Only the stack of calls tells."""
    code = CheckpointFunction.forward.__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def compiler_traces_gradients() -> bool:
    """Whether ``torch.compile`` traces ``torch.autograd.grad``; off by default, and not in 2.10."""
    return getattr(torch._dynamo.config, "trace_autograd_ops", False)


def tracing_gradients() -> Any:
    """A context in which ``torch.compile`` traces ``torch.autograd.grad`` (2.11): the setting has no public name."""
    from torch._dynamo import config  # a second of import that only compilers need

    return config.patch(trace_autograd_ops=True)


def compiler_errors() -> tuple[type[Exception], type[Exception]]:
    """What ``torch.compile`` raises of too many shapes, and the base of what else it raises; not published."""
    from torch._dynamo import exc

    return exc.FailOnRecompileLimitHit, exc.TorchDynamoException


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` was called; nothing public remembers."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on the module; public are only the registrations."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_hooks_inside(module: nn.Module, left_out: Sequence[nn.Module] = ()) -> bool:
    """Whether a module inside ``module`` has one, ``left_out`` aside; in half the time that ``modules`` takes."""
    inner = [module]
    for parent in inner:
        for child in parent._modules.values():
            if child is None:
                continue
            if has_hooks(child) and child not in left_out:
                return True
            if child._modules and child not in inner:
                inner.append(child)
    return False


def runs_as_written(module: nn.Module, forwards: Mapping[type, Any]) -> bool:
    """Whether all modules inside run the forwards that ``forwards`` holds for their classes: none compiled or patched.

    Classes that an attachment put in place (``_plain_class``) count as those that they replace.
    """
    inner = [module]
    for parent in inner:
        for child in parent._modules.values():
            if child is None:
                continue
            if not is_as_written(child, forwards):
                return False
            if child._modules and child not in inner:
                inner.append(child)
    return True


def is_as_written(module: nn.Module, forwards: Mapping[type, Any]) -> bool:
    """Whether the module itself runs the forward that ``forwards`` holds for its class, as ``runs_as_written`` asks."""
    cls = type(module)
    cls = cls.__dict__.get("_plain_class", cls)
    written = forwards.get(cls) is cls.forward and "forward" not in module.__dict__
    return written and module._compiled_call_impl is None


def has_global_hooks() -> bool:
    """Whether one is registered on all modules, as profilers and counters do; public as ``has_hooks``."""
    every = nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def is_looked_at(x: Tensor) -> bool:
    """Whether a hook of the tensor is shown its gradient, or it keeps it; public are only the registrations."""
    return bool(x._backward_hooks) or x.retains_grad


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own dictionary of parameters, for reading and for writing past ``__setattr__``.

    ``named_parameters`` and ``getattr`` also give what a parametrisation or another hook computes.
    """
    return module._parameters


def running_ddp() -> Any:
    """The ``DistributedDataParallel`` whose forward runs, or None. The module inside cannot ask."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Those modules in ``model`` that ``fully_shard`` gave parameters of their own to gather.

    ``fully_shard`` marks modules of which it gathers nothing with the same public class.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not fsdp.FSDPModule.__subclasses__():  # fully_shard makes one for each class
        return []
    sharded = (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))
    return [module for module in sharded if _fsdp_group(module) is not None]


def reshards_after_backward(module: Any) -> bool:
    """Whether FSDP2 frees the module's gathered parameters after a backward pass.

    ``set_reshard_after_backward`` is public; what it was is not.
    """
    return _fsdp_group(module).reshard_after_backward


def is_gathered(module: Any) -> bool:
    """Whether FSDP2 holds the module's parameters whole: public are only ``unshard`` and ``reshard``."""
    return _fsdp_group(module).is_unsharded


def is_fsdp_root(module: Any) -> bool:
    """Whether FSDP2 takes the module for the outermost of a model, which it finds at the first forward."""
    return module._get_fsdp_state()._is_root


def _fsdp_group(module: Any) -> Any:
    return module._get_fsdp_state()._fsdp_param_group


def steps_with_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves out a step by itself if ``GradScaler`` found an overflow, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def forget_scaled(scaler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let a ``GradScaler`` begin the optimizer's step anew after one that was broken off; public is how to end it."""
    scaler._per_optimizer_states.pop(id(optimizer), None)
    for name in ("grad_scale", "found_inf"):  # given to fused optimizers for the time of their step
        vars(optimizer).pop(name, None)


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own dictionary of buffers; as ``own_parameters``."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own dictionary of modules inside it; as ``own_parameters``."""
    return module._modules
