"""Which folders are packages; pyproject.toml says the rest.

The folder ``kernels/`` is not a package: it holds one, ``diversevit_kernels``.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["diversevit_fast", "diversevit_fast.*"]),
        *find_packages("kernels", include=["diversevit_kernels", "diversevit_kernels.*"]),
    ],
    package_dir={"diversevit_kernels": "kernels/diversevit_kernels"},
    package_data={
        "diversevit_fast": ["py.typed"],
        "diversevit_fast.experiment": ["*.jinja"],
        "diversevit_kernels": ["py.typed"],
        "diversevit_kernels.cpu": ["csrc/*"],
    },
)
