"""How much is enough, and where: the mildest ratio for a target, and one integer program over the whole network."""

from featherweight.allocation.program import Allocation, front, solve
from featherweight.allocation.ratios import allocate, gradually
from featherweight.allocation.recipes import Healing, recipe_of
from featherweight.allocation.storage import tables_of
from featherweight.allocation.tables import measure_tables
from featherweight.allocation.treatments import Group, Row, Tables, Treatment

__all__ = [
    "Allocation",
    "Group",
    "Healing",
    "Row",
    "Tables",
    "Treatment",
    "allocate",
    "front",
    "gradually",
    "measure_tables",
    "recipe_of",
    "solve",
    "tables_of",
]
