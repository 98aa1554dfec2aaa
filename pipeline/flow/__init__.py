"""Where the stages run: in this process and its helpers (`run_local`), or on a cluster (`run_ray`)."""

from pipeline.flow.local import run_local
from pipeline.flow.metrics import Metrics
from pipeline.flow.on_ray import map_blocks, run_ray
from pipeline.flow.plan import Plan, Stages, load_refiner
from pipeline.flow.session import Placement, noted_signals, stopped_by_signals

__all__ = [
    "Metrics",
    "Placement",
    "Plan",
    "Stages",
    "load_refiner",
    "map_blocks",
    "noted_signals",
    "run_local",
    "run_ray",
    "stopped_by_signals",
]
