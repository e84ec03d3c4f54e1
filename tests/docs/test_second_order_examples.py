"""The second-order recipes: every command runs, every function agrees with attention by formula in float64."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diversevit_fast as dvf

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "second_order"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`(python [^`]+\.py)`", README)


@pytest.fixture
def recipe(monkeypatch):
    """A recipe by name, as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command):
    if "text_model" in command:
        pytest.importorskip("transformers")
    run = subprocess.run(
        [sys.executable, *command.split()[1:]],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 600},
    )
    assert run.returncode == 0, run.stderr
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", run.stdout)]
    assert numbers
    assert all(abs(x) < 1e6 for x in numbers)


def test_every_script_has_a_command():
    assert {c.rpartition("/")[2] for c in COMMANDS} == {path.name for path in EXAMPLES.glob("*.py")}


def vit(classes: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": classes}
    return VisionTransformer(16, 8, **sizes).double()


def images(count: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=g, dtype=torch.float64)


def agrees(loss_of, module: nn.Module) -> None:
    """``loss_of()`` and its gradient are those of PyTorch's attention by formula."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def computed():
        torch.manual_seed(3)
        loss = loss_of()
        return loss, *torch.autograd.grad(loss, parameters, allow_unused=True)

    ours = computed()
    with dvf.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        wanted = computed()
    assert any(g is not None and g.abs().max() > 1e-6 for g in wanted[1:])
    for a, b in zip(ours, wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["r1_loss", "wgan_gp_loss"])
def test_critics(recipe, name):
    critic, loss = vit(1), getattr(recipe("critics"), name)
    agrees(lambda: loss(critic, images(3), images(3, seed=2)), critic)


def test_r1_is_half_the_squared_gradient(recipe):
    critic, real = vit(1), images(2)
    with_penalty, without = (
        recipe("critics").r1_loss(critic, real, real, weight) for weight in (10.0, 0.0)
    )
    with dvf.second_order():
        leaf = real.requires_grad_()
        (grad,) = torch.autograd.grad(critic(leaf).sum(), leaf)
    torch.testing.assert_close(with_penalty - without, 5 * grad.square().sum() / 2)


@pytest.mark.parametrize("steps", [1, 2])
def test_maml(recipe, steps):
    model, labels = vit(2), torch.arange(4) % 2
    support, query = (images(4), labels), (images(4, seed=2), labels)
    agrees(lambda: recipe("maml").meta_loss(model, support, query, 0.1, steps), model)


def test_maml_is_the_loss_after_a_step(recipe):
    model, labels = vit(2), torch.arange(4) % 2
    support, query = (images(4), labels), (images(4, seed=2), labels)
    ours = recipe("maml").meta_loss(model, support, query, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(support[0]), support[1]).backward()
    optimizer.step()
    torch.testing.assert_close(ours, F.cross_entropy(model(query[0]), query[1]))


class Small(nn.Module):
    """Attention with so few parameters that its whole Hessian can be made."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.head(o.transpose(1, 2).flatten(2).mean(1))


def test_curvature_is_the_whole_hessians(recipe):
    torch.manual_seed(0)
    model, labels = Small().double(), torch.arange(6) % 2
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    names, weights = zip(*model.named_parameters(), strict=True)
    sizes = [w.numel() for w in weights]

    def loss_of(flat):
        parts = [p.view_as(w) for p, w in zip(flat.split(sizes), weights, strict=True)]
        logits = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return F.cross_entropy(logits, labels)

    flat = torch.cat([w.detach().flatten() for w in weights])
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss_of, flat)
    curvature = recipe("curvature")
    product = curvature.hessian_product(model, lambda: F.cross_entropy(model(x), labels))
    v = torch.randn_like(flat)
    torch.testing.assert_close(product(v), hessian @ v)
    g = torch.Generator().manual_seed(0)
    trace, error = curvature.hutchinson_trace(product, len(flat), 400, g, torch.float64)
    assert abs(trace - hessian.trace()) < 4 * error
    assert error < 0.2 * hessian.trace()
    values = torch.linalg.eigvalsh(hessian)
    largest = values[values.abs().argmax()].item()
    found = curvature.top_eigenvalue(product, torch.ones_like(flat), 1000, 1e-9)
    assert found == pytest.approx(largest, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_curvature_is_pyhessians(recipe):
    """PyHessian cannot differentiate PyTorch's fused attention; by formula it finds what the recipe finds."""
    pyhessian = pytest.importorskip("pyhessian")
    curvature, model, labels = recipe("curvature"), vit(4).eval(), torch.arange(8) % 4
    x = images(8)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = pyhessian.hessian(model, nn.CrossEntropyLoss(), (x, labels), cuda=False)
    product = curvature.hessian_product(model, lambda: F.cross_entropy(model(x), labels))
    torch.manual_seed(0)
    v = [torch.randn_like(p) for p in theirs.params]
    products = torch.autograd.grad(theirs.gradsH, theirs.params, v, retain_graph=True)
    flat = torch.cat([x.flatten() for x in v])
    torch.testing.assert_close(product(flat), torch.cat([x.flatten() for x in products]))
    (largest,), _ = theirs.eigenvalues(maxIter=1000, tol=1e-8)
    assert curvature.top_eigenvalue(product, flat, 1000, 1e-8) == pytest.approx(largest, rel=1e-4)
    samples = torch.tensor(theirs.trace(maxIter=200, tol=float("-inf")))
    g = torch.Generator().manual_seed(0)
    trace, error = curvature.hutchinson_trace(product, len(flat), 200, g, torch.float64)
    assert len(samples) == 200
    assert abs(trace - samples.mean()) < 4 * (error + samples.std() / 200**0.5)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_pyhessian_runs_inside_the_block():
    """Made there it needs no other attention; outside PyTorch raises."""
    pyhessian = pytest.importorskip("pyhessian")
    model, data = vit(4).eval(), (images(8), torch.arange(8) % 4)

    def largest():
        torch.manual_seed(0)
        made = pyhessian.hessian(model, nn.CrossEntropyLoss(), data, cuda=False)
        return made.eigenvalues(maxIter=20, tol=0.0)[0][0]

    with pytest.raises(RuntimeError, match="is not implemented"):
        largest()
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = largest()
    model.zero_grad()
    with dvf.second_order():
        assert largest() == pytest.approx(wanted, rel=1e-9)


def atoms():
    g = torch.Generator().manual_seed(1)
    positions = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    return torch.randint(4, (2, 5), generator=g), positions


def test_forces(recipe):
    torch.manual_seed(0)
    forces, (species, positions) = recipe("forces"), atoms()
    model = forces.Potential(width=16).double()
    wanted = forces.harmonic(positions)
    agrees(lambda: forces.loss(model, species, positions, *wanted), model)


def test_forces_are_finite_differences(recipe):
    """Of the energy; and the force loss's gradient is a finite difference of the force loss."""
    torch.manual_seed(0)
    forces, (species, positions) = recipe("forces"), atoms()
    model, h = forces.Potential(width=16).double(), 1e-5
    _, ours = forces.energy_and_forces(model, species, positions)
    step = torch.zeros_like(positions)
    step[1, 2, 0] = h
    with torch.no_grad():
        slope = (model(species, positions + step) - model(species, positions - step)) / (2 * h)
    assert ours[1, 2, 0].item() == pytest.approx(-slope[1].item(), rel=1e-6)

    def loss():
        return forces.loss(model, species, positions, *forces.harmonic(positions))

    (grad,) = torch.autograd.grad(loss(), model.falloff)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.falloff[1] += sign * h
        values.append(loss().item())
        with torch.no_grad():
            model.falloff[1] -= sign * h
    assert grad[1].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_jacobian(recipe):
    torch.manual_seed(0)
    jacobian = recipe("jacobian")
    block = jacobian.CrossAttention(8, 2, 3).double()
    context = torch.randn(2, 4, 8, dtype=torch.float64)
    agrees(lambda: jacobian.jacobian_penalty(block, context, 2), block)


def test_jacobian_is_estimated_without_bias(recipe):
    torch.manual_seed(0)
    jacobian = recipe("jacobian")
    block = jacobian.CrossAttention(8, 2, 2).double()
    context = torch.randn(1, 3, 8, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.autograd.functional.jacobian(block, context).square().sum()
    estimate = jacobian.jacobian_penalty(block, context, 1000)
    assert estimate.item() == pytest.approx(whole.item(), rel=0.1)


def test_text_model(recipe):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = recipe("text_model")
    model = text.bert().double().eval()
    tokens, labels = torch.randint(100, (3, 6)), torch.arange(3) % 2
    mask = (torch.arange(6) < torch.tensor([6, 3, 4])[:, None]).long()
    agrees(lambda: text.smoothness_loss(model, tokens, mask, labels), model)
