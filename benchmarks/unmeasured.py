"""Figures that no run has had yet, each with the command that measures it and how long that is reckoned to take.

    python benchmarks/unmeasured.py

Writes a row without a value for each of them, and drops the rows of those that another results file holds by now.
"""

from __future__ import annotations

import json

from results import FOLDER, record

NAME = "unmeasured"
TRAINED = ("qat_w4", "qat_w4a4", "qat_w2", "ternary", "binary")
QAT = {"resnet20": 60, "vgg19": 90, "minilm": 120}
MARGINS = {"mlp": 120, "lstm": 480, "lenet300": 200, "resnet20": 300, "vgg19": 500, "resnet56": 300, "minilm": 500}
MINUTES = {
    **{
        f"quantization.{network}.{figure}.drop": (f"quantization_qat.py {network}", minutes)
        for network, minutes in QAT.items()
        for figure in TRAINED
    },
    "quantization.efficientnet.over_best_runtime": ("quantization_latency.py efficientnet", 15),
    "quantization.export.unexplained": ("quantization_export.py", 30),
    **{f"lowrank.{figure}": ("lowrank_sweep.py", 230) for figure in ("whitened_over_plain", "allocated_over_uniform")},
    "distillation.unlabelled.recovery": ("distillation_unlabelled.py", 40),
    **{f"distillation.sets.{figure}": ("distillation_table.py", 350) for figure in ("soft_targets", "best_other")},
    **{f"bytes.{network}.over_nncodec": ("bytes_rdoq.py", 200) for network in ("resnet56", "vgg19", "minilm")},
    **{f"bytes.{figure}.saving": ("bytes_rdoq.py", 200) for figure in ("rdoq", "cerwu")},
    "bytes.vgg19.ptq.ratio": ("bytes_rdoq.py --networks vgg19", 80),
    "bytes.lenet5.ratio": ("bytes_lenet.py --network lenet5", 360),
    "bytes.vgg19.student.ratio": ("bytes_vgg19.py student", 60),
    "bytes.vgg19.own.ratio": ("bytes_vgg19.py own", 120),
    **{
        f"budget.{network}.margin": (f"budget_margins.py --networks {network}", minutes)
        for network, minutes in MARGINS.items()
    },
    "budget.strict_wins": ("budget_margins.py", sum(MARGINS.values())),
    "budget.resnet20.minutes": ("budget_resnet20.py", 20),
    "budget.amc.gap": ("budget_amc.py resnet20 0 1 2", 90),
    "budget.evolution.gap": ("budget_amc.py resnet20 0 1 2", 90),
    "budget.supernet.resnet20.gap": ("budget_supernet.py resnet20 0", 200),
    "budget.supernet.transformer.gap": ("budget_supernet.py transformer 0 1 2", 75),
    "evaluation.newcomer.minutes": ("evaluation_newcomer.py", 20),
}


def main() -> None:
    """Write the rows."""
    path = FOLDER / f"{NAME}.json"
    path.unlink(missing_ok=True)
    files = [other for other in FOLDER.glob("*.json") if not other.name.endswith(".partial.json")]
    known = {row["id"] for other in files for row in json.loads(other.read_text())}
    for identifier, (command, minutes) in MINUTES.items():
        if identifier not in known:
            note = f"not run to its end yet: `python benchmarks/{command}` is reckoned at {minutes} minutes of one core"
            record(NAME, identifier, None, 0, note)


if __name__ == "__main__":
    main()
