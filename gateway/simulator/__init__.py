"""Clusters we do not have: the real scheduler against simulated stages, in virtual time.

Pure: no I/O, no threads, no clock. `stageline simulate` prints what comes out.
"""

from gateway.simulator.cluster import simulate
from gateway.simulator.result import Result
from gateway.simulator.scenario import Failures, GatewayCost, Scenario, Traffic

__all__ = ["Failures", "GatewayCost", "Result", "Scenario", "Traffic", "simulate"]
