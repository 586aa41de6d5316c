"""Compare what `featherweight run` wrote with the labels: the accuracy of the file, from a process without the model."""

import sys

import numpy as np


def main(outputs_path: str, labels_path: str) -> None:
    outputs, labels = np.load(outputs_path), np.load(labels_path)
    hits = int((outputs.argmax(1) == labels).sum())
    sys.stdout.write(f"{hits} of {len(labels)} test images right, run from the file in a fresh process\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
