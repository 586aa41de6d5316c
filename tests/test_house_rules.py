"""What holds for every file of the house."""

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from featherweight.technique import name_of
from featherweight.techniques import TECHNIQUES

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "featherweight"
FILES = sorted(HOUSE.rglob("*.py"))
# Imports go downhill: a file may import what stands on a line above its own, and its own folder.
ORDER = tuple(
    re.findall(
        r"\w+",
        """
    errors descriptors cpu modes data synthetic scoring significance ensembles verdict budget layers coding costs edits masking packed_graph
    recurrent_graph trace graph sizes technique scoping running techniques post_training students selection recipe_files
    integer_graph float_graph attention_graph portable runtimes agreement tensor_table artifact packing arrays latency device_command
    latency_table delivery precision measurement allocation inspection search mixes report preflight job contest untrained candidates
    supernet proof planning pipeline tasks journal trials spaces workers comparison study exploration amc zoo testing commands cli
""",
    )
)
MOST_LINES = 400
MOST_FIELDS = 8


def tree(path):
    return ast.parse(path.read_text())


def top(path):
    """The name of a file in `ORDER`: its folder's, where it is in one."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path):
    """The modules a file imports, dotted; what is imported for types alone does not count."""
    found, parsed = [], tree(path)
    typing_only = {
        id(inner)
        for node in ast.walk(parsed)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(parsed):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def names(paths):
    return [str(path.relative_to(HOUSE)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_go_downhill(path):
    own = top(path)
    if own in ("__init__", "__main__"):
        return
    assert own in ORDER, f"give {own} its place in ORDER"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "featherweight" or len(parts) < 2 or parts[1] not in ORDER:
            continue
        assert parts[1] == own or ORDER.index(parts[1]) < ORDER.index(own), (
            f"{own} imports {module}, which stands below it"
        )


@pytest.mark.parametrize("technique", TECHNIQUES, ids=name_of)
def test_a_technique_imports_no_other(technique):
    """Shared functions of another technique's file are fine; its class is not."""
    classes = {other.__name__ for other in TECHNIQUES}
    path = HOUSE / "techniques" / f"{name_of(technique)}.py"
    assert not classes & {module.rpartition(".")[2] for module in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_files_stay_small(path):
    kept = set()
    skip = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in skip:
            kept.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            kept -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(kept) <= MOST_LINES, f"{len(kept)} lines of code"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_nothing_is_unpickled_printed_or_asserted(path):
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & {
        module.split(".")[0] for module in imports(path)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "eval", "exec", "torch.load"), f"line {node.lineno}: {called}"
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert"


def test_public_names_are_there():
    import featherweight

    public = getattr(featherweight, "__all__", None)
    if public is None:
        pytest.skip("featherweight has no __all__ yet")
    assert sorted(set(public)) == sorted(public), "a name stands twice"
    missing = [name for name in public if not hasattr(featherweight, name)]
    assert not missing


def rows():
    """The rows of the table in the docs, by name."""
    text = (ROOT / "docs" / "techniques.md").read_text()
    return {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` \|.*$", text, re.MULTILINE)}


def test_no_row_without_a_technique():
    assert set(rows()) == {name_of(technique) for technique in TECHNIQUES}


@pytest.mark.parametrize("technique", TECHNIQUES, ids=name_of)
def test_every_technique_has_its_file_test_row_and_few_settings(technique):
    name = name_of(technique)
    assert (HOUSE / "techniques" / f"{name}.py").exists()
    assert (ROOT / "tests" / "techniques" / f"test_{name}.py").exists()
    fields = dataclasses.fields(technique)
    assert len(fields) <= MOST_FIELDS
    row = rows()[name]
    stage = technique.stage.name.lower() if technique.stage is not None else "any"
    assert f"| {stage} |" in row
    for field in fields:
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        limits = (
            " ".join(map(str, choices))
            if choices
            else ""
            if isinstance(field.default, bool | str)
            else f"{low:g} to {high:g}"
        )
        wanted = f"`{field.name}` {default}" + (f" ({limits})" if limits else "")
        assert wanted in row, f"docs/techniques.md: the row of {name} lacks {wanted!r}"


@pytest.mark.parametrize("technique", TECHNIQUES, ids=name_of)
def test_every_technique_says_where_it_is_from_and_what_it_costs(technique):
    assert dataclasses.is_dataclass(technique)
    assert getattr(technique, "__final__", False)
    for word in ("Paper:", "Use when:", "Costs:"):
        assert word in technique.__doc__


def test_importing_warns_of_nothing():
    code = "import featherweight, featherweight.techniques, featherweight.artifact, featherweight.testing"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
