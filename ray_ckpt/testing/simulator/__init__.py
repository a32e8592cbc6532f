"""A seeded simulation of whole jobs: the real protocol and log code under simulated time, network, disk and death.

`run` plays one `Scenario` and raises `SimulationError` with its story when an oracle objects. The same seed gives the
same run.
"""

from ray_ckpt.testing.simulator.run import Result, SimulationError, run
from ray_ckpt.testing.simulator.scenario import FAULTS, Scenario, draw

__all__ = ["FAULTS", "Result", "Scenario", "SimulationError", "draw", "run"]
