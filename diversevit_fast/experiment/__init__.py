"""The paper's experiment end to end: train ERM and DiverseViT, select heads, write a report.

Data flow: ``config`` (settings) -> ``run`` (run or resume, in a ``run_folder``) -> ``train`` (one method and
seed, saved by ``checkpoint``) -> ``evaluate`` (every head on every split) -> ``metrics`` (rows, selection)
-> ``plots`` -> ``report``. ``continued_run`` trains a run further. ``distributed`` (with ``sharded``
checkpoints) lets several ranks train as one process does. ``sweep`` trains many settings on many seeds.
``cli`` and ``commands`` are the command line. The rest of the library imports nothing of this.
"""

from .config import Settings, resolve
from .continued_run import continue_run
from .report import write_report
from .run import resume, run
from .several import load_metrics
from .sweep import resume_sweep, run_sweep
from .sweep_grid import Grid
from .sweep_results import load_results

__all__ = [
    "Grid",
    "Settings",
    "continue_run",
    "load_metrics",
    "load_results",
    "resolve",
    "resume",
    "resume_sweep",
    "run",
    "run_sweep",
    "write_report",
]
