"""The recipes of `recipes/`: each says where it is from, can be carried out, and is measured by its benchmark."""

from pathlib import Path

import pytest
import torch
import yaml

from featherweight import Context, load_recipe, run
from featherweight.comparison.scaling import with_epochs
from featherweight.data import complete, forward

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_carried_out(path, clusters):
    recipe = load_recipe(path)
    training = sum(getattr(step, "epochs", 0) > 0 for step in recipe.steps)
    data = complete(clusters.data)[0]
    small, edits = run(with_epochs(recipe, training), clusters.model, Context(data=data, teacher=clusters.model))
    assert edits
    assert bool(torch.isfinite(forward(small, data.example[0])).all())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_where_it_is_from_and_is_measured(path):
    told = yaml.safe_load(path.read_text())
    assert set(told) >= {"name", "about", "steps"}
    assert any(str(year) in told["about"] for year in range(2000, 2027))
    assert f'"{path.stem}"' in (ROOT / "benchmarks" / "evaluation_recipes.py").read_text()
