"""Commands on files: inspect, run, export, verify, pack and unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.commands.console import AsJson, FileName, show


def inspect(file: FileName, as_json: AsJson = False) -> None:
    """Show what is in a file: recipe, facts, bytes by part, layers. Nothing in it is executed."""
    from featherweight.artifact import load
    from featherweight.inspection import inspect_artifact

    show(inspect_artifact(load(file)), str(file), as_json)


def run(
    file: FileName,
    inputs: Annotated[
        Path,
        typer.Option("--input", help="One array as .npy, or several named ones as .npz; dimension 0 is the batch."),
    ],
    output: Annotated[
        Path, typer.Option("--output", help="Where the outputs go: .npy for a single one, .npz for several.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Run a file on ONNX Runtime; it needs neither the original class nor its code."""
    from featherweight.arrays import check_output, read_arrays, run_batched, write_arrays
    from featherweight.artifact import load

    check_output(output)
    artifact = load(file)
    names, outputs = run_batched(artifact, read_arrays(inputs), batch)
    write_arrays(output, names, outputs)
    show(
        {"file": str(file), "outputs": names, "shapes": [list(value.shape) for value in outputs]}, str(output), as_json
    )


def export(
    file: FileName,
    to: Annotated[str, typer.Option(help="A runtime's format; see [b]list runtimes[/b].")] = "onnx",
    out: Annotated[Path, typer.Option(help="Folder for the exported files.")] = Path("exported"),
    task: Annotated[
        str | None, typer.Option(help="The task it was made from: its class and data, to compare on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a file to a runtime's format, check that it computes the same, and show how it computes each layer."""
    from featherweight.inspection import export_file
    from featherweight.tasks import find_task

    show(export_file(file, to, out, find_task(task) if task is not None else None), str(file), as_json)


def verify(file: FileName, as_json: AsJson = False) -> None:
    """Check a file: checksum, every stream, the graph, and a run on noise. Exit code 1 and a reason if anything is wrong."""
    from featherweight.artifact import load
    from featherweight.inspection import verify_artifact

    show(verify_artifact(load(file)), str(file), as_json)


def pack(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS.safetensors", help="Tensors of any model.")],
    out: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("weights.fw"),
    sqnr: Annotated[
        float | None, typer.Option(help="Round, and keep at least so many dB of signal to noise in each tensor.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Round until the file is this small: [b]500KB[/b], [b]10%[/b] or [b]8x[/b].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pack tensors into one small file: lossless, or rounded to a stated quality or size.

    Example: featherweight pack model.safetensors --size 10% --out model.fw
    """
    from featherweight.budget import Budget
    from featherweight.packing import packed_file

    limit = Budget.parse(f"size<={size}").limits[0] if size is not None else None
    show(packed_file(weights, out, sqnr, limit), str(out), as_json)


def unpack(
    file: Annotated[Path, typer.Argument(metavar="WEIGHTS.fw", help="What [b]pack[/b] made.")],
    out: Annotated[Path, typer.Option(help="Where the tensors go.")] = Path("weights.safetensors"),
    as_json: AsJson = False,
) -> None:
    """Unpack tensors into a safetensors file."""
    from featherweight.packing import unpacked_file

    show(unpacked_file(file, out), str(out), as_json)
