"""The fault suite; importing it finds every fault."""

from tests.faults import damage, interruptions, mistakes, restarts
from tests.faults.bench import FAULTS, Bench, Fault, Outcome

__all__ = ["FAULTS", "Bench", "Fault", "Outcome", "damage", "interruptions", "mistakes", "restarts"]
