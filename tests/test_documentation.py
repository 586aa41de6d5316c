"""What the documents say works: every Python block runs, every command of the README is there, every example runs."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n+```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
SKIP = re.compile(r"<!-- not run: (?P<reason>.+) -->")
HELPERS = {"digits_input.py", "digits_check.py"}  # of `make demo`, run in sequence
LONG = {"lstm_speech.py", "transformer_text.py"}  # over ten seconds each
EXAMPLES = [
    pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in LONG else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
    if path.name not in HELPERS
]
MOST_LINES = 60


def blocks():
    """Every Python block of the documents, with the file and line it stands in."""
    for path in [README, *sorted((ROOT / "docs").rglob("*.md"))]:
        text = "\n" + path.read_text()
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start("code"))
            skip = SKIP.search(found["before"])
            marks = [pytest.mark.skip(reason=skip["reason"])] if skip else []
            yield pytest.param(path, line, found["code"], id=f"{path.relative_to(ROOT)}:{line}", marks=marks)


@pytest.mark.parametrize(("path", "line", "code"), list(blocks()))
def test_a_block_runs(path, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, f"{path.name}", "exec"), {"__name__": "block"})


def test_a_block_of_a_document_is_found_and_skipped_where_it_says_so():
    text = "\ntext\n\n```python\na = 1\n```\n<!-- not run: needs a GPU -->\n```python\nb = 2\n```\n```sh\nls\n```\n"
    found = list(BLOCK.finditer(text))
    assert [item["code"] for item in found] == ["a = 1\n", "b = 2\n"]
    assert [bool(SKIP.search(item["before"])) for item in found] == [False, True]


def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readme_names_the_two_commands(target):
    assert f"make {target}" in README.read_text()
    assert target in targets()


def test_every_make_command_in_the_documents_exists():
    for path in [README, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"(?:^|`)make ([\w-]+)", path.read_text(), re.MULTILINE):
            assert target in targets(), f"{path.name}: make {target}"


def test_every_command_of_the_command_line_is_in_the_readme():
    from featherweight.cli import app

    text = README.read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"featherweight {name}" in text, name


def test_every_link_to_a_file_leads_somewhere():
    for path in [README, *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")


def test_the_helpers_of_the_demo_run_in_sequence(tmp_path):
    pytest.importorskip("sklearn")

    def helper(name, *arguments):
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / name, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    helper("digits_input.py", "x.npy", "labels.npy")
    images, labels = np.load(tmp_path / "x.npy"), np.load(tmp_path / "labels.npy")
    assert images.shape == (360, 1, 8, 8)
    outputs = np.eye(10, dtype=np.float32)[labels]
    outputs[:10] = np.roll(outputs[:10], 1, axis=1)
    np.save(tmp_path / "y.npy", outputs)
    assert helper("digits_check.py", "y.npy", "labels.npy").startswith("350 of 360 test images right")


def test_the_benchmark_page_is_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = importlib.import_module("page")
    assert page.PAGE.read_text() == page.rendered(), "run python benchmarks/page.py"


def test_table_and_picture_of_the_readme_are_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = importlib.import_module("page")
    assert page.picture(page.PICTURED.read_text()) == page.PICTURE.read_text(), "run python benchmarks/page.py"
    assert page.readme(README.read_text()) == README.read_text(), "run python benchmarks/page.py"


def test_every_page_is_in_the_site():
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", ["families.md", "choose.md"])
def test_every_figure_that_a_page_names_is_measured(name):
    measured = (ROOT / "docs" / "benchmarks.md").read_text()
    named = re.findall(r"`([a-z]\w+\.[a-z0-9_.]+)`", (ROOT / "docs" / name).read_text())
    assert named
    for figure in named:
        assert f"| `{figure}` |" in measured, figure


def test_every_name_of_the_reference_is_public():
    import featherweight

    for name in re.findall(r"^::: featherweight\.(\w+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE):
        assert name in featherweight.__all__
