"""Write the digits task's test images and labels as .npy files, for `featherweight run`."""

import sys

import numpy as np

from featherweight.tasks.digits import task_data


def main(images_path: str, labels_path: str) -> None:
    images, labels = zip(*task_data().test, strict=True)
    np.save(images_path, np.concatenate([batch.numpy() for batch in images]))
    np.save(labels_path, np.concatenate([batch.numpy() for batch in labels]))


if __name__ == "__main__":
    main(*sys.argv[1:3])
