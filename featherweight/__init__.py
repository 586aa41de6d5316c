"""Deep-learning model compression: state a budget, get one deployable file that keeps it, and a report that proves it."""

from featherweight.allocation import allocate, gradually
from featherweight.artifact import Artifact, load
from featherweight.budget import Budget
from featherweight.comparison import compare
from featherweight.data import Data, Task
from featherweight.inspection import measure_task as measure
from featherweight.pipeline import compress
from featherweight.post_training import post_training
from featherweight.recipe_files import load_recipe
from featherweight.report.facts import Report
from featherweight.running import run
from featherweight.scoping import only
from featherweight.scoring import lower
from featherweight.technique import Context, Recipe, Technique
from featherweight.verdict import Verdict

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "Budget",
    "Context",
    "Data",
    "Recipe",
    "Report",
    "Task",
    "Technique",
    "Verdict",
    "allocate",
    "compare",
    "compress",
    "gradually",
    "load",
    "load_recipe",
    "lower",
    "measure",
    "only",
    "post_training",
    "run",
]
