"""How much is enough, and where: the mildest ratio for a target, and one integer program over the whole network."""

from featherweight.allocation.program import Allocation, front, solve
from featherweight.allocation.ratios import allocate, gradually
from featherweight.allocation.recipes import PREPARED, Healing, closing_steps, recipe_of
from featherweight.allocation.seconds import with_seconds
from featherweight.allocation.storage import tables_of
from featherweight.allocation.tables import EIGHTHS, loose_parameters, measure_tables
from featherweight.allocation.treatments import Group, Row, Tables, Treatment

__all__ = [
    "EIGHTHS",
    "PREPARED",
    "Allocation",
    "Group",
    "Healing",
    "Row",
    "Tables",
    "Treatment",
    "allocate",
    "closing_steps",
    "front",
    "gradually",
    "loose_parameters",
    "measure_tables",
    "recipe_of",
    "solve",
    "tables_of",
    "with_seconds",
]
