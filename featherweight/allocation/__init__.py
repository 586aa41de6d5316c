"""How much is enough, and where: the mildest ratio for a target, and one integer program over the whole network."""

from featherweight.allocation.program import Allocation, front, solve
from featherweight.allocation.ratios import allocate, gradually
from featherweight.allocation.treatments import Group, Row, Tables, Treatment

__all__ = ["Allocation", "Group", "Row", "Tables", "Treatment", "allocate", "front", "gradually", "solve"]
