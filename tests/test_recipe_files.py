"""Recipes as text."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import RecipeError
from featherweight.recipe_files import known_techniques, load_recipe, recipe_from_json, recipe_to_yaml
from featherweight.scoping import Only
from featherweight.technique import Recipe
from featherweight.techniques import TECHNIQUES


def value_of(field):
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    if choices:
        return st.sampled_from(choices)
    if isinstance(field.default, str):
        return st.just(field.default)  # text with a grammar of its own, read when the technique is made
    if isinstance(field.default, bool):
        return st.booleans()
    return st.integers(int(low), int(high)) if isinstance(field.default, int) else st.floats(low, high)


def steps():
    single = [st.builds(t, **{f.name: value_of(f) for f in dataclasses.fields(t)}) for t in TECHNIQUES]
    patterns = st.lists(st.text("abc.*!?[]0", min_size=1).filter(str.strip), min_size=1, max_size=3).map(tuple)
    plain = st.one_of(single)
    return st.one_of(plain, st.builds(Only, patterns, plain))


@given(st.lists(steps(), max_size=5))
@settings(max_examples=60, deadline=None)
def test_round_trip(parts):
    recipe = Recipe(tuple(parts), any_order=True)
    assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe_from_json(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "- fold_batch_norm\n- prune_weights: {ratio: 0.8}\n",
        "name: mine\nsteps: [fold_batch_norm, {prune_weights: {ratio: 0.8}}]",
    ],
)
def test_files(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert str(recipe) == "fold_batch_norm() -> prune_weights(ratio=0.8)"
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_json()))
    assert load_recipe(tmp_path / "r.json") == recipe


def test_nested_recipes_and_scopes():
    recipe = recipe_from_json(
        [{"only": {"patterns": "layer1", "step": {"steps": ["low_rank", {"prune_weights": None}]}}}]
    )
    assert [str(s) for s in recipe.steps] == ["only(layer1: low_rank())", "only(layer1: prune_weights())"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "list of steps"),
        ({"stages": []}, "list of steps"),
        ({"steps": [], "any_ordr": True}, "any_ordr.*any_order"),
        ({"steps": [], 3: 1}, "'3'"),
        ({"steps": [], "any_order": "no"}, "any_order='no'"),
        ([3], "step 1: 3"),
        ([{"a": {}, "b": {}}], "step 1"),
        (["fold_batchnorm"], "step 1.*fold_batchnorm.*fold_batch_norm"),
        ([{"prune_weights": 0.9}], "step 1.*0.9"),
        (["fold_batch_norm", {"prune_weights": {"ration": 0.9}}], "step 2.*'ration'.*'ratio'"),
        ([{"prune_weights": {"ratio": 2}}], "step 1.*ratio=2"),
        ([{"prune_weights": {"ranking": ["lamp"]}}], "step 1.*ranking"),
        ([{"quantize_weights": {"bits": "4"}}], "bits='4'"),
        ([{"only": {"patterns": ["a"]}}], "only takes"),
        ([{"only": {"patterns": 3, "step": "low_rank"}}], "only takes"),
        ([{3: {}}], "unknown technique 3"),
        (["quantize_weights", "fold_batch_norm"], r"fold_batch_norm\(\).*quantize_weights\(\)"),
    ],
)
def test_what_is_refused(value, words):
    with pytest.raises(RecipeError, match=words):
        recipe_from_json(value)


@pytest.mark.parametrize("text", [b"steps: [", b"\xff\xfe\x00", b"steps: [unknown]", b"", b"- &a {steps: [*a]}"])
def test_files_that_are_refused_name_themselves(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.yaml"):
        load_recipe(tmp_path / "missing.yaml")


def test_every_technique_is_known_by_its_name():
    assert len(known_techniques()) >= len(TECHNIQUES)
