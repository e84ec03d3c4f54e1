"""Classes that a module is given for the time of a block, whose forward goes through a wrapper."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .attention_modules import plain_class_of
from .torch_calls import Forward

Wrapper = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]
"""Called with a module, its own forward, and the arguments; returns what the forward should."""


def swapped_class(base: type, wrapper: Wrapper, overrides: dict[str, Any]) -> type:
    """Make a subclass of ``base``, of the same name, whose forward goes through ``wrapper``.

    Args:
        overrides: attributes that instances have whatever is set on them. timm's attention modules call fused
            attention only if ``self.fused_attn``.
    """

    @functools.partial(functools.update_wrapper, wrapped=base.forward, assigned=(), updated=())
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(module, swapped):
            return _bound_before(swapped, module, args, kwargs)
        return wrapper(module, super(swapped, module).forward, args, kwargs)  # pyright: ignore

    def __reduce_ex__(module: nn.Module, protocol: Any) -> Any:  # noqa: N807
        reduced: Any = base.__reduce_ex__(module, max(2, protocol))  # pyright: ignore
        return (_bare_instance, (plain_class_of(base),), *reduced[2:])

    body = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "_plain_class": plain_class_of(base),
        "_wrapper": wrapper,
        **{name: property(lambda _, value=value: value) for name, value in overrides.items()},
    }
    swapped = type(base.__name__, (base,), body)
    return swapped


def refuse_own_forward(name: str, module: nn.Module) -> None:
    """Refuse a module with a forward of its own in place of its class's, which would pass by a swapped class.

    Raises:
        UnsupportedError: ``module`` has one.
    """
    if "forward" in vars(module):
        raise UnsupportedError(
            f"model: {name} has a forward put on the instance, which would pass by this "
            "context; remove it (accelerate: remove_hook_from_module)"
        )


def _bound_before(swapped: type, module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Run the forward of a class that the module has no longer, as a checkpoint does that recomputes it.

    The wrapper is that of the class it has now. Underneath the module is what it was: transformers' layers look
    at their class to tell whether a checkpoint runs them.
    """
    now: Any = type(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        set_class(module, swapped)
        try:
            return super(swapped, module).forward(*args, **kwargs)  # pyright: ignore
        finally:
            set_class(module, now)

    if plain_class_of(now) is now:
        return forward(*args, **kwargs)
    return vars(now)["_wrapper"](module, forward, args, kwargs)


def run_swapped(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Run a module's own forward through the wrapper of the class that it has, past what else is around it.

    transformers puts checkpoints around the forward of every class that is derived from its layers.
    """
    swapped: Any = type(module)
    return vars(swapped)["_wrapper"](module, super(swapped, module).forward, args, kwargs)  # pyright: ignore


def around(outer: Wrapper, inner: Wrapper) -> Wrapper:
    """The wrapper that runs ``inner`` as the forward of ``outer``."""

    def wrapper(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return outer(module, lambda *a, **k: inner(module, forward, a, k), args, kwargs)

    return wrapper


def set_class(module: nn.Module, cls: type) -> None:
    """``module.__class__ = cls``, past what modules do when an attribute is set."""
    object.__setattr__(module, "__class__", cls)


def _bare_instance(cls: Any) -> Any:
    return cls.__new__(cls)
