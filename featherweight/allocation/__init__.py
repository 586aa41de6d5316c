"""How much is enough, and where: the mildest ratio for a target, and one integer program over the whole network."""

from featherweight.allocation.program import Allocation, front, solve
from featherweight.allocation.ratios import allocate, gradually
from featherweight.allocation.recipes import PREPARED, Healing, last, recipe_of
from featherweight.allocation.seconds import with_seconds
from featherweight.allocation.storage import tables_of
from featherweight.allocation.tables import EIGHTHS, measure_tables, others
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
    "front",
    "gradually",
    "last",
    "measure_tables",
    "others",
    "recipe_of",
    "solve",
    "tables_of",
    "with_seconds",
]
