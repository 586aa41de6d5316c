"""Two processes on one training come to what one comes to, write one file and print once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from safetensors.torch import load_file

from featherweight.comparison import compare
from featherweight.errors import ModelError, RecipeError
from featherweight.exploration import explore
from featherweight.planning import plan
from featherweight.preflight import find_device
from featherweight.techniques import together

RECIPE = "steps: [prune_weights: {ratio: 0.6, epochs: 2}, quantize_weights: {bits: 6}]"


@pytest.fixture(scope="module")
def made(task_file, tmp_path_factory):
    """The folder in which two processes have left what each of them came to."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "recipe.yaml").write_text(RECIPE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["compress", f"{task_file}:task", "--budget", "size<=60%, drop<=5pt", "--recipe", folder / "recipe.yaml"]
    done = subprocess.run(
        [*launch, two_processes.__file__, folder, *command, "--json", "--out", folder / "model.fw"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder


def both(folder, name):
    return [load_file(folder / rank / f"{name}.safetensors") for rank in "01"]


@pytest.mark.parametrize("case", [*two_processes.CASES, "resumed"])
def test_both_come_to_the_same_bit_for_bit(made, case):
    one, other = both(made, case)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["fitted", "pruned", "noisy", "entropy", "quantized"])
def test_two_processes_come_to_what_one_comes_to(made, case):
    """Batches of uneven sizes, hooks and noise of the penalty included."""
    alone, (two, _) = two_processes.CASES[case](), both(made, case)
    assert alone.keys() == two.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(two[name], tensor.detach(), rtol=1e-4, atol=1e-5)
    start = two_processes.network().state_dict()
    assert not all(name in two and torch.allclose(two[name], start[name], atol=1e-3) for name in start)


def test_what_no_output_depends_on_is_left_as_it_was(made):
    """Weight decay would change it if the processes agreed on a gradient of nothing."""
    fitted, start = both(made, "fitted")[0], two_processes.network().state_dict()
    assert torch.equal(fitted["unused.weight"], start["unused.weight"])
    assert "gradient/unused.weight" not in fitted


def test_batch_norms_have_seen_every_share(made):
    alone, (two, _) = two_processes.CASES["normed"](), both(made, "normed")
    torch.testing.assert_close(two["0.running_mean"], alone["0.running_mean"])
    assert not torch.allclose(two["0.running_mean"], torch.zeros(10), atol=1e-3)


def test_a_killed_training_goes_on_from_one_checkpoint(made):
    resumed, whole = both(made, "resumed")[0], both(made, "fitted")[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in resumed)
    assert len(list((made / "run").iterdir())) == 1
    for rank in "01":
        assert (made / rank / "said.txt").read_text() == "training: epoch 2/2"


def test_one_writes_and_prints_and_both_have_the_artifact(made):
    facts = json.loads((made / "0" / "out.txt").read_text())
    assert facts["verdict"]["met"]
    assert (made / "1" / "out.txt").read_text() == ""
    assert {path.name for path in made.iterdir()} == {"0", "1", "run", "recipe.yaml", "model.fw"}
    for rank in "01":
        assert (made / rank / "model.fw").read_bytes() == (made / "model.fw").read_bytes()
        assert (made / rank / "verdict.txt").read_text() == facts["verdict"]["text"]


def test_an_error_of_the_first_is_raised_in_both(made):
    for rank in "01":
        assert (made / rank / "refused.txt").read_text() == "the first process cannot do it"


@pytest.fixture
def place(monkeypatch):
    """Make this process one of three."""
    monkeypatch.setenv("WORLD_SIZE", "3")

    def set_place(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    set_place(0)
    return set_place


def test_shares_are_weighed_by_their_samples(place):
    values, labels, total, seen = torch.randn(8, 3), torch.arange(8.0), torch.zeros(()), []
    for rank in range(3):
        place(rank)
        (part,), target, weight = together.share((values,), labels)
        assert len(part) == len(target)
        total += weight * (part.sum(1) * target).mean() / 3
        seen += target.tolist()
    assert seen == labels.tolist()
    torch.testing.assert_close(total, (values.sum(1) * labels).mean())


@pytest.mark.parametrize(
    ("inputs", "target"),
    [
        (torch.zeros(5, 2), torch.zeros(5)),
        (torch.zeros(8, 2), torch.zeros(20)),
        (torch.zeros(8, 2), tuple({"box": torch.zeros(8, 4)} for _ in range(8))),
        ({"values": torch.zeros(8, 2), "scale": torch.zeros(())}, None),
    ],
    ids=["small", "flattened", "nested", "no rows"],
)
def test_what_cannot_be_taken_apart_is_every_process_s_whole(place, inputs, target):
    assert together.share(inputs, target) == (inputs, target, 1.0)


def test_a_dict_without_labels_is_taken_apart(place):
    place(1)
    inputs, target, weight = together.share({"values": torch.arange(9)}, None)
    assert (inputs["values"].tolist(), target, weight) == ([3, 4, 5], None, 1.0)


def test_processes_that_cannot_train_together_are_refused(place, monkeypatch):
    for device in ("mps", "cuda:0"):
        with pytest.raises(ModelError, match="3 processes train on 'cuda', a GPU each"):
            find_device(device)
    assert find_device("cpu") == torch.device("cpu")
    place(2)
    assert together.own(torch.device("cuda")) == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ModelError, match="only 1 of 3 processes are on this machine"):
        together.told(lambda: 1)


def test_what_they_would_do_several_times_is_refused(place, clusters, tmp_path):
    calls = {
        "search": lambda: explore(clusters, "size<=50%", tmp_path),
        "compare": lambda: compare(clusters, ["bits"], ["2x"], out=tmp_path),
        "plan": lambda: plan(clusters.model, clusters.data, "size<=50%"),
    }
    for name, call in calls.items():
        with pytest.raises(RecipeError, match=f"{name} does not run under torchrun"):
            call()
    assert not list(Path(tmp_path).iterdir())
