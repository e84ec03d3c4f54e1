"""compile_loss: compiles a whole training loss, cross-entropy and penalty, into one graph.

A model that is compiled by itself cannot be differentiated twice: the penalty would be refused or, asked
for in some ways, dropped. In one graph with its loss it is right: Dynamo records the inner gradient and
AOTAutograd differentiates through it. That needs ``torch._dynamo.config.trace_autograd_ops`` on every
call, not only the first.
"""

import ast
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import ops
from .._torch_internals import compiler_errors, tracing_gradients
from ..errors import UnsupportedError, UsageError, usage_error
from .torch_calls import open_attachments

Loss = TypeVar("Loss", bound=Callable[..., Any])


def compile_loss(fn: Loss, *, dynamic: bool | None = None, **options: Any) -> Loss:
    """Compile ``fn`` as one graph that is right to second order, or raise an error.

    >>> diversity = HeadDiversity(model)
    >>> def loss(model, images, labels):
    ...     with diversity:
    ...         logits = model(images)
    ...     return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)
    >>> loss = compile_loss(loss)
    >>> loss(model, images, labels).backward()

    The ``with`` block belongs inside ``fn``, and the model is not compiled by itself. A penalty of your own
    works too: ``torch.autograd.grad(..., create_graph=True)`` of what is made of this library's operators
    and PyTorch's own twice-differentiable ones. It is compiled at the first call, and again for other
    shapes, dtypes, or the model's other mode.

    Inside, ``HeadDiversity`` computes the last block for all tokens (the class-token shortcut is not
    taken), does not look for NaN, and counts no steps. On two CPU cores a compiled step gained
    nothing (1.07 to 1.22 times the uncompiled one's time, 12 to 27 s to compile): measure yours.

    Args:
        fn: takes the model, tensors and plain values; returns the loss, or a tuple with it.
        dynamic: as ``torch.compile``'s; True where the batch size varies.
        options: ``torch.compile``'s ``backend``, ``mode``, ``options``.

    Raises:
        UsageError: ``fn`` is a model or no function; ``fullgraph`` is given; at a call, what this library
            raises inside ``fn``.
        UnsupportedError: PyTorch is older than 2.14. At a call, what cannot be in the graph, in one line:
            ``HeadDiversity`` with ``every`` or ``fraction``, a frozen model up to the regularised layer,
            checkpointing of that layer, ``dvf.nn.HeadPenalty``, Python that Dynamo cannot trace, too
            many shapes. Also a call while a context of this library is entered.
    """
    if not callable(fn) or isinstance(fn, torch.nn.Module):
        hint = "pass lambda model, images, labels: ..., the penalty included"
        raise usage_error("fn", "a function that returns the loss", type(fn).__name__, hint)
    if "fullgraph" in options:
        raise usage_error(
            "fullgraph", "nothing", options["fullgraph"], "a loss is always one graph"
        )
    if torch.__version__ < "2.14":  # TorchVersion compares numbers, not characters
        raise UnsupportedError(
            "compile_loss: needs PyTorch 2.14, whose compiler traces torch.autograd.grad and enters a "
            f"context that was made outside the graph; this is {torch.__version__}"
        )
    too_many_shapes, any_error = compiler_errors()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, **options)

    @functools.wraps(fn)
    def loss(*args: Any, **kwargs: Any) -> Any:
        if contexts := open_attachments():
            name = type(contexts[0]).__name__
            raise UnsupportedError(f"compile_loss: called inside `with {name}`; enter it inside fn")
        try:
            keys: Any = torch.compiler.config
            tag = f"{keys.cache_key_tag}{_operators()}"
            with tracing_gradients(), keys.patch(cache_key_tag=tag):
                return compiled(*args, **kwargs)
        except too_many_shapes:
            raise UnsupportedError(
                "compile_loss: compiled too often for other shapes or values; pass dynamic=True, "
                "drop the last short batch, or raise torch._dynamo.config.recompile_limit"
            ) from None
        except any_error as failure:
            raise _in_one_line(failure) from failure

    return loss  # pyright: ignore[reportReturnType]


@functools.cache
def _operators() -> str:
    """A checksum of the operators' sources, for the key of Inductor's cache on disk.

    The cache knows operators only by name: of another version of this library it could hold code for
    results of other shapes.
    """
    sources = sorted(Path(ops.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _in_one_line(failure: Exception) -> Exception:
    """The error to raise for a failed compilation: ours if it ended the tracing, else the compiler's."""
    raised = re.search(r"^ *Developer debug context: raised exception (.*)", str(failure), re.M)
    own = raised and re.fullmatch(r"(UsageError|UnsupportedError)\((['\"].*['\"])\)", raised[1])
    if own:
        kind = UsageError if own[1] == "UsageError" else UnsupportedError
        return kind(ast.literal_eval(own[2]))
    stack = getattr(failure, "real_stack", None) or ()
    where = "".join(f" (at {frame.filename}:{frame.lineno})" for frame in list(stack)[-1:])
    reason = f"it raises {raised[1]}" if raised else _reason(failure)
    return UnsupportedError(f"compile_loss: cannot be one graph{where}: {' '.join(reason.split())}")


def _reason(failure: Exception) -> str:
    """The part of a compiler's message that says what happened."""
    text = str(failure)
    head, _, rest = text.partition("\n")
    inner = getattr(failure, "inner_exception", None)  # the error of the compiler's backend
    if inner is not None:
        said = next((line for line in str(inner).splitlines() if line.strip()), "")
        return f"{head} {type(inner).__name__}: {said or 'no message'}{_hint_for(said)}"
    why = re.search(r"Explanation: (.*)", rest)
    if why:
        return f"{head}: {why[1]}"
    return f"{head} {rest.strip().partition(chr(10))[0]}" if head.rstrip().endswith(":") else head


def _hint_for(message: str) -> str:
    if re.search(r"derivative for aten::_\w*scaled_dot_product\w* is not implemented", message):
        return (
            "; PyTorch's own attention has no second derivative: enter HeadDiversity inside fn around the "
            "model's call, or use dvf.attention"
        )
    return ""
