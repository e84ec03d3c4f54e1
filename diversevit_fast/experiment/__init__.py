"""The paper's experiment end to end: train ERM and DiverseViT, select heads, write a report.

Data flow: ``config`` (what to run) -> ``run`` (and resume; ``folder`` is how its files live) ->
``train`` (one method and seed) -> ``evaluate`` (every head on every split) -> ``metrics`` (rows,
selection) -> ``plots`` ->
``report``. ``distributed`` (and ``sharded``, its checkpoints) lets several ranks train as one process
does. ``commands`` puts the command line in front. The rest of the library imports nothing
of this.
"""

from .config import Settings, resolve
from .report import write_report
from .run import resume, run

__all__ = ["Settings", "resolve", "resume", "run", "write_report"]
