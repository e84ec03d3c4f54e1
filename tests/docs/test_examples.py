"""The recipes: every command runs, and every training system gets the gradients of one plain backward."""

import importlib
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import diversevit_fast as dvf

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
STUDY = "scaling_study.py"  # trains nothing: test_scaling_study.py runs it
COMMANDS = [
    command
    for command in re.findall(r"`((?:python|torchrun|accelerate) [^`]+\.py[^`]*)`", README)
    if STUDY not in command
]
LINE = re.compile(r"^step (\d+)  loss (\S+)  penalty (\S+)$", re.MULTILINE)
OTHERS = ("--amp", "hf_trainer", "own_model")  # what makes a recipe's lines its own
WEIGHT = 10.0

pytestmark = [
    # Lightning: on machines with many cores; its own use of an old PyTorch name
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


@pytest.fixture(autouse=True, scope="module")
def _importable():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def recipe(name: str):
    """The script as a module; skipped where what it needs is not installed."""
    needs = {"lightning_module": "lightning", "accelerate_loop": "accelerate"}
    for package in ("transformers", "accelerate") if name == "hf_trainer" else (needs.get(name),):
        if package:
            pytest.importorskip(package)
    if name == "timm_task":
        pytest.importorskip("timm.task")
    return importlib.import_module(name)


def vit() -> VisionTransformer:
    return recipe("tiny").vit().double()


def data(samples: int = 16) -> TensorDataset:
    images, labels = recipe("tiny").dataset(samples).tensors
    return TensorDataset(images.double(), labels)


@contextmanager
def recorded(model: nn.Module):
    """The gradients at each optimizer step, by parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    steps: list[dict[str, Tensor]] = []

    def keep(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append({names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None})

    handle = register_optimizer_step_post_hook(keep)
    try:
        yield steps
    finally:
        handle.remove()


def plain(model: nn.Module, batches, forward=None, clip: float = torch.inf):
    """Gradients by parameter, and (loss, penalty), of one plain backward for each batch."""
    diversity = dvf.HeadDiversity(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reports = []
    with recorded(model) as steps:
        for images, targets in batches:
            with diversity:
                logits = forward(images) if forward else model(images)
            loss, penalty = F.cross_entropy(logits, targets), diversity.penalty(logits)
            optimizer.zero_grad()
            (loss + WEIGHT * penalty).backward()
            clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            reports.append((loss.item(), penalty.item()))
    return steps, reports


def assert_same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    """Each step's gradients agree to float64 rounding, and the penalty is part of them."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-6, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.fixture
def seen(monkeypatch) -> list[tuple[float, ...]]:
    """What a recipe reports, unrounded. Clipping is off: it would hide a wrong scale."""
    reports: list[tuple[float, ...]] = []
    monkeypatch.setattr(
        recipe("tiny"), "report", lambda step, *terms: reports.append(tuple(map(float, terms)))
    )
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)
    return reports


def unclipped(parameters, *args, **kwargs) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def run_accelerate(model: nn.Module) -> None:
    module = recipe("accelerate_loop")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # it is shared by everything in a process
    GradientState._reset_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    module.train(accelerator, model, optimizer, DataLoader(data(), batch_size=4))


def run_checkpointed(model: VisionTransformer) -> None:
    module = recipe("checkpointed")
    module.checkpoint_blocks(model, list(model.blocks))
    module.train(model, DataLoader(data(), batch_size=8))


def run_compiled_below(model: VisionTransformer) -> None:
    module = recipe("checkpointed")
    module.compile_below(list(model.blocks)[:-1], "aot_eager")
    module.train(model, DataLoader(data(), batch_size=8))


def run_lightning(model: nn.Module) -> None:
    module = recipe("lightning_module")
    loader, validation = DataLoader(data(), batch_size=4), DataLoader(data(), batch_size=8)
    assert 0 <= module.train(model, loader, validation).callback_metrics["accuracy"] <= 1


RUNS = {
    "plain": lambda model: recipe("plain_loop").train(model, DataLoader(data(), batch_size=4)),
    "timm": lambda model: recipe("timm_task").train(model, DataLoader(data(), batch_size=8)),
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "compiled-loss": lambda model: recipe("compiled_loss").train(
        model, DataLoader(data(), batch_size=8), backend="aot_eager"
    ),
    "checkpointed": run_checkpointed,
    "compiled-below": run_compiled_below,
}


@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_those_of_a_plain_backward(name, seen):
    """Two optimizer steps on eight samples each, accumulated where the system does."""
    wanted, reports = plain(vit(), DataLoader(data(), batch_size=8))
    model = vit()
    with recorded(model) as steps:
        RUNS[name](model)
    steps = [{k.replace("_checkpoint_wrapped_module.", ""): g for k, g in s.items()} for s in steps]
    assert_same(steps, wanted)
    assert seen == [pytest.approx(r, rel=1e-7) for r in reports]


@pytest.mark.parametrize("name", ["plain", "timm", "lightning", "accelerate"])
def test_clipping(name):
    """To norm 1, the gradient of the whole step; Adam itself would not see a missing or wrong clip."""
    wanted, _ = plain(vit(), DataLoader(data(), batch_size=8), clip=1.0)
    model = vit()
    with recorded(model) as steps:
        RUNS[name](model)
    assert_same(steps, wanted)


def test_float16_is_unscaled_before_clipping():
    model = recipe("tiny").vit()
    loader = DataLoader(recipe("tiny").dataset(32), batch_size=4)
    with recorded(model) as steps:
        recipe("plain_loop").train(model, loader, amp=torch.float16)
    norms = [torch.nn.utils.get_total_norm(step.values()).item() for step in steps]
    assert len(norms) >= 2  # GradScaler skips steps until its scale fits
    assert norms == [pytest.approx(1, abs=1e-3)] * len(norms)


def test_the_reference_contains_the_penalty():
    """Without it every comparison above would be one of cross-entropies."""
    model = vit()
    images, labels = data(8).tensors
    F.cross_entropy(model(images), labels).backward()
    alone = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    (whole,), _ = plain(vit(), [(images, labels)])
    whole = torch.cat([g.flatten() for g in whole.values()])
    assert (whole - alone).norm() > 0.05 * alone.norm()


def soft_mixup(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    mixup = Mixup(mixup_alpha=0.8, num_classes=recipe("tiny").CLASSES)
    images, targets = mixup(images.clone(), labels)
    return images, targets.double()


def test_mixup(seen):
    """Soft targets; each micro-batch is mixed by itself, so the joint batch is of mixed images."""
    np.random.seed(0)
    batches = [soft_mixup(*batch) for batch in DataLoader(data(), batch_size=4)]
    joint = [tuple(map(torch.cat, zip(*batches[i : i + 2], strict=True))) for i in (0, 2)]
    assert all(((targets > 0).sum(-1) > 1).any() for _, targets in joint)
    wanted, _ = plain(vit(), joint)
    model = vit()
    np.random.seed(0)
    with recorded(model) as steps:
        loader = DataLoader(data(), batch_size=4)
        recipe("plain_loop").train(model, loader, mixup=soft_mixup)
    assert_same(steps, wanted)


@pytest.mark.parametrize(("amp", "bound"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_mixed_precision(amp, bound):
    """Close to the float64 gradient, scaled by GradScaler or not."""
    module, scale = recipe("plain_loop"), 1024.0
    (wanted,), ((_, value),) = plain(vit(), [data(8).tensors])
    model = recipe("tiny").vit()
    images, labels = recipe("tiny").dataset(8).tensors
    half = amp == "float16"
    _, penalty = module.backward(
        dvf.HeadDiversity(model),
        [(images[:4], labels[:4]), (images[4:], labels[4:])],
        weight=WEIGHT,
        scaler=torch.amp.GradScaler("cpu", init_scale=scale, enabled=half),
        amp=getattr(torch, amp),
    )
    assert float(penalty) == pytest.approx(value, rel=bound)
    ours = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    ours /= scale if half else 1.0
    theirs = torch.cat([wanted[name].flatten() for name, _ in model.named_parameters()])
    assert (ours - theirs).norm() < bound * theirs.norm()


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 2), (1, 4), (4, 1)])
def test_hf_trainer_accumulates(batch, accumulate, seen):
    """Micro-batches equal one batch of four; also the loss that it logs."""
    module = recipe("hf_trainer")
    images, labels = data(4).tensors
    model = module.vit().double()
    forward = lambda images: model(pixel_values=images).logits  # noqa: E731
    wanted, reports = plain(model, [(images, labels)], forward)
    ours = module.vit().double()
    with recorded(ours) as steps:
        module.train(ours, TensorDataset(images, labels), batch=batch, accumulate=accumulate)
    assert_same(steps, wanted)
    assert seen == [pytest.approx(r, rel=1e-7) for r in reports]


def test_timm_task_evaluates_and_refuses_to_compile():
    task = recipe("timm_task").DiverseClassificationTask(recipe("tiny").vit(), verbose=False)
    images, labels = recipe("tiny").dataset(4).tensors
    with torch.no_grad():
        assert "penalty" not in task.eval()(images, labels)
    with pytest.raises(dvf.UnsupportedError, match="compile"):
        task.compile()


def test_own_model_equals_head_diversity():
    module = recipe("own_model")
    torch.manual_seed(0)
    model = module.AverageViT().double()
    images, labels = data(8).tensors
    (wanted,), ((loss, penalty),) = plain(model, [(images, labels)])
    torch.manual_seed(0)
    model = module.AverageViT().double()
    terms = module.terms(model, images, labels)
    (terms[0] + WEIGHT * terms[1]).backward()
    assert [term.item() for term in terms] == pytest.approx([loss, penalty], rel=1e-9)
    assert_same([{name: p.grad for name, p in model.named_parameters()}], [wanted])


RANK = """
import os
import sys
sys.path[:0] = [{examples!r}, {root!r}]
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
import tiny
import {name} as recipe

vit, dataset, steps, reports = tiny.vit, tiny.dataset, [], []

def double(samples=16):
    images, labels = dataset(samples).tensors
    return torch.utils.data.TensorDataset(images.double(), labels)

def keep(optimizer, args, kwargs):
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    steps.append([g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads])

tiny.vit, tiny.dataset = lambda: vit().double(), double
tiny.report = lambda step, *terms: reports.append([float(term) for term in terms])
torch.nn.utils.clip_grad_norm_ = lambda *args, **kwargs: None
register_optimizer_step_post_hook(keep)
recipe.main()
torch.save((steps, reports), sys.argv[1] + "/rank" + os.environ["RANK"])
"""


@pytest.mark.parametrize("name", ["torchrun_ddp", "torchrun_fsdp2"])
def test_two_ranks_equal_the_joint_batch(name, tmp_path):
    """A rank's batch is every second sample; gradients and reports are means over ranks."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(name=name, examples=str(EXAMPLES), root=str(ROOT)))
    run = launch(["torchrun", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)])
    assert run.returncode == 0, run.stderr
    model = vit()
    wanted, reports = plain(model, DataLoader(data(), batch_size=8))
    names = [name for name, _ in model.named_parameters()]
    for rank in (0, 1):
        steps, told = torch.load(tmp_path / f"rank{rank}")
        assert_same([dict(zip(names, grads, strict=True)) for grads in steps], wanted)
        assert told == ([pytest.approx(r, rel=1e-7) for r in reports] if rank == 0 else [])


def launch(words: list[str]) -> subprocess.CompletedProcess:
    """Run a command of the README with this interpreter, on the CPU."""
    modules = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
    program, *rest = words
    python = [sys.executable] if program == "python" else [sys.executable, "-m", modules[program]]
    if program == "accelerate":
        rest = ["--cpu", "--main_process_port", "0", *rest[1:]]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*python, *rest],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, **hidden},
    )


@pytest.fixture(scope="module")
def lines() -> list[tuple[float, float]]:
    """What the recipes of the common model print, from a plain loop with clipping, in float32."""
    tiny = recipe("tiny")
    return plain(tiny.vit(), DataLoader(tiny.dataset(), batch_size=8), clip=1.0)[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_print_what_they_should(command, lines):
    words = command.split()
    recipe(next(w for w in words if w.endswith(".py")).removeprefix("examples/")[:-3])
    if "compile" in command:
        words += ["--backend", "aot_eager"]  # Inductor's code has its own tests and takes a minute
    run = launch(words)
    assert run.returncode == 0, run.stderr
    steps = LINE.findall(run.stdout)
    assert [int(step) for step, _, _ in steps] == list(range(8))
    losses, penalties = ([float(row[i]) for row in steps] for i in (1, 2))
    assert all(0 < value < 1 for value in penalties)
    assert sum(losses[-2:]) < sum(losses[:2])
    if not any(word in command for word in OTHERS):
        assert list(zip(losses, penalties, strict=True)) == [
            pytest.approx(line, abs=5e-4) for line in lines
        ]


def test_every_script_has_a_command():
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"tiny.py", STUDY}
    assert {Path(word).name for c in COMMANDS for word in c.split() if ".py" in word} == scripts
