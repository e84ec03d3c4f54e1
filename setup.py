"""Packaging. The folder ``kernels/`` is not a package: it holds one, ``diversevit_kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "diversevit_fast/version.py").read_text())[1]

TRAIN = [
    "timm>=1.0.20",
    "torchvision",
    "scikit-learn",
    "pillow",
    "typer>=0.12",
    "rich",
    "matplotlib",
    "jinja2",
    "safetensors",
    "tensorboard",
]
HF = ["transformers>=4.50"]
OPEN_CLIP = ["open_clip_torch"]
XFORMERS = ["xformers"]
CORRUPTIONS = ["imagecorruptions-imaug"]
ONNX = ["onnx"]
BENCH = ["pytest", "pytest-benchmark[histogram]"]
RECIPES = [*HF, "lightning>=2.6", "accelerate>=1.15"]
DEV = [
    *(*TRAIN, *BENCH, *RECIPES, *OPEN_CLIP, *XFORMERS, *CORRUPTIONS),
    *("hypothesis", "pytest-xdist", "ruff", "pyright"),
    *(*ONNX, "onnxruntime", "onnxscript"),
]

setup(
    name="diversevit-fast",
    version=VERSION,
    description="Attention, LayerNorm and GELU to second order, for Vision Transformers trained with "
    "a penalty on the gradients of their attention heads",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["diversevit_fast", "diversevit_fast.*"]),
        *find_packages("kernels", include=["diversevit_kernels", "diversevit_kernels.*"]),
    ],
    package_dir={"diversevit_kernels": "kernels/diversevit_kernels"},
    package_data={
        "diversevit_fast": ["py.typed"],
        "diversevit_fast.experiment": ["*.jinja"],
        "diversevit_kernels.cpu": ["csrc/*"],
    },
    install_requires=["torch>=2.10", "numpy", "triton>=3.6; sys_platform == 'linux'"],
    extras_require={
        "train": TRAIN,
        "hf": HF,
        "xformers": XFORMERS,
        "open-clip": OPEN_CLIP,
        "corruptions": CORRUPTIONS,
        "onnx": ONNX,
        "recipes": RECIPES,
        "bench": BENCH,
        "dev": DEV,
        "all": DEV,
    },
    entry_points={"console_scripts": ["diversevit = diversevit_fast.experiment.cli:main"]},
)
