"""xformers' own tests of its attention operators, run on the pair of ``integrations.xformers``.

``python -m tools.docs.xformers_suite SDIST [pytest's options]``: SDIST is the unpacked source distribution of the
installed xformers (``pip download --no-deps --no-binary :all: xformers``), whose
``tests/test_mem_eff_attention.py`` is run with our pair in place of xformers' operators. The file's helper module
is not in the distribution; what it takes from it is below. It needs scipy.

One failure is expected, ``test_unsupported_cpu``, which asserts that CPU tensors are refused. Of the
rest, what needs a GPU is skipped.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

HELPERS = '''
"""What test_mem_eff_attention.py imports from its neighbour, for a machine without a GPU."""
import pytest
import torch
from xformers.attn_bias_utils import ref_attention as ref_attention_for_test
from xformers.attn_bias_utils import ref_attention_bmhk as ref_attention_bmhk_for_test

cuda_only = cuda_or_mtia_only = rocm_only = pytest.mark.skip(reason="requires a GPU")


def disable_tf32(fn):
    return fn


disable_on_mtia = disable_on_rocm = disable_tf32


def use_cpu_ref(device):
    return False


def construct_fp8_attention_inputs(*args, **kwargs):
    raise NotImplementedError("needs a GPU")


def assert_allclose(out, ref, msg="failed", atol=1e-8, rtol=1e-5):
    torch.testing.assert_close(out, ref, atol=atol, rtol=rtol, msg=lambda m: f"{msg}: {m}")
'''

OUR_PAIR = """
from xformers.ops import fmha

from diversevit_fast.integrations.xformers import BwOp, FwOp

fmha.ALL_FW_OPS[:], fmha.ALL_BW_OPS[:] = [FwOp], [BwOp]
"""


def main(sdist: Path, options: list[str]) -> int:
    """pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "xformers_tests"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "conftest.py").write_text(OUR_PAIR, encoding="utf-8")
        (package / "utils.py").write_text(HELPERS, encoding="utf-8")
        shutil.copy(sdist / "tests" / "test_mem_eff_attention.py", package)
        return pytest.main([str(package), "-q", f"--rootdir={folder}", "-c", "/dev/null", *options])


if __name__ == "__main__":
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests/test_mem_eff_attention.py").is_file():
        sys.exit(
            "usage: python -m tools.docs.xformers_suite SDIST [pytest's options]  (see its docstring)"
        )
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
