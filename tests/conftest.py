"""Slow tests wait for --slow; tests compute on one thread, spend no time on steady clocks, and share one small task."""

import copy
import functools
import sys
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)

# What a user would write: the task of the end-to-end tests, and the way it is given to the command line.
TASK_FILE = '''
"""Four clusters in ten dimensions, and a perceptron that tells them apart."""
import torch
from torch import nn

import featherweight


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
        self.head = nn.Linear(24, 4)

    def forward(self, values):
        return self.head(self.inner(values))


def batches(count, seed, size=32):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    labels = [torch.randint(0, 4, (size,), generator=draw) for _ in range(count)]
    return [(centres[label] + torch.randn(size, 10, generator=draw), label) for label in labels]


def trained(model, train):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(6):
        for values, labels in train:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(values), labels).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def task():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train = batches(10, 1)
        data = featherweight.Data(example=(train[0][0][:1],), train=train, validate=batches(5, 2), test=batches(5, 3))
        return featherweight.Task(model=trained(Perceptron(), train), data=data)
'''


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


def _once(make):
    """The function, made once for each of its arguments; every call gets lists of its own, to which it may add."""
    made = functools.cache(make)

    def again(*arguments, **named):
        registry = copy.copy(made(*arguments, **named))
        registry.functions = {name: list(known) for name, known in registry.functions.items()}
        return registry

    return again


def _once_a_set(make):
    """The function of a set, carried out once for each; every call gets a table of its own."""
    made = {}

    def again(members):
        key = frozenset(map(id, members))
        if key not in made:
            made[key] = members, make(members)  # members live on, so that no other gets their identity
        return dict(made[key][1])

    return again


@pytest.fixture(autouse=True, scope="session")
def quick(tmp_path_factory):
    """Times are taken in a few calls, since no test asserts one; the exporter makes its tables of operators once."""
    from onnxscript._framework_apis import torch_2_5
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    import featherweight.delivery
    import featherweight.latency
    import featherweight.precision

    hasty = functools.partial(featherweight.latency.interleaved, seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(featherweight.latency, "_SPIN", 0.0)
        patch.setattr(featherweight.latency, "_TURN", 0.0)
        # CPUs with matrix units train in bfloat16, in which a test's numbers would be others than on the rest
        patch.setenv("FEATHERWEIGHT_TRAINING", "float32")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(
            featherweight.latency, "interleaved", lambda calls, *ignored, **ignored_too: hasty(calls, least=3)
        )
        patch.setattr(featherweight.delivery, "interleaved", featherweight.latency.interleaved)
        patch.setattr(
            featherweight.precision, "rounds", lambda calls, *ignored: featherweight.latency.rounds(calls, 0.0, 3)
        )
        patch.setattr(torch_2_5, "get_torchlib_ops", functools.cache(torch_2_5.get_torchlib_ops))
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_once(ONNXRegistry.from_torchlib)))
        decompositions = _decomp.create_onnx_friendly_decomposition_table
        patch.setattr(_decomp, "create_onnx_friendly_decomposition_table", _once_a_set(decompositions))
        yield


@pytest.fixture(scope="session")
def task_file(tmp_path_factory):
    """The path of a user's own file; its task is `task_file:task`."""
    path = tmp_path_factory.mktemp("user") / "clusters.py"
    path.write_text(TASK_FILE)
    return path


@pytest.fixture(scope="session")
def clusters(task_file):
    """The user's task, trained; tests must not change it."""
    from featherweight.tasks import find_task

    return find_task(f"{task_file}:task")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process; gives `code`, `out` and `err`."""
    from featherweight.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["featherweight", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    return call


@pytest.fixture
def refused(command):
    """Run the command line on what it must refuse: exit code 1, one line on standard error that has every word."""

    def call(*arguments, words=()):
        done = command(*arguments)
        assert done.code == 1, done.err
        assert done.out == ""
        lines = done.err.strip().splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("error: ")
        for word in words:
            assert str(word) in lines[0]
        return lines[0]

    return call


@pytest.fixture(scope="session")
def browser():
    """A headless browser, for pages; see `browsing.py`."""
    from browsing import CHROMIUM, QUIET
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *QUIET])
        yield started
        started.close()
