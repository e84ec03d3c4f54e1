"""The paper's experiment end to end: train ERM and DiverseViT, select heads, write a report.

Data flow: ``config`` (settings) -> ``run`` (run or resume, in a ``run_folder``) -> ``train`` (one method and
seed, saved by ``checkpoint``) -> ``evaluate`` (every head on every split) -> ``metrics`` (rows, selection)
-> ``plots`` -> ``report``. ``distributed`` (with ``sharded`` checkpoints) lets several ranks train as one
process does. ``cli`` and ``commands`` are the command line. The rest of the library imports nothing of this.
"""

from .config import Settings, resolve
from .report import write_report
from .run import resume, run

__all__ = ["Settings", "resolve", "resume", "run", "write_report"]
