"""Fine-tuning of a pretrained network to a few new classes: does L3RS, specialised to it, pay?

The job: a new read-out layer for 3 classes, on the features of EfficientNet-Lite0
(`metaopt.tasks.cached`), with 20 or 100 training images of each class, in 50 steps. `metaopt
specialise` searches and meta-trains on six classes of CIFAR-10. The result is judged on the four
others, on FashionMNIST and on MNIST, bare and under `race`, beside baselines that are tuned on each
of these.

    metaopt data prepare cifar10 --from DIR     # mnist and fashion_mnist, too; docs/data.md
    python -m experiments.finetuning

Needs the extra `pretrained`. Takes 8 minutes on 2 CPU cores; it resumes. Writes to runs/finetuning;
the records of both evaluations are in docs/results/specialised.
"""

import io
import sys
import time
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from metaopt import datasets, tasks
from metaopt.core.files import write_whole
from metaopt.core.types import SPLITS, Batch, Split, TaskFamily
from metaopt.jobs.specialise import SpecialiseJob, specialise
from metaopt.report import print_summary, report
from metaopt.tasks import networks

OUT = Path("runs/finetuning")
SEEN = (0, 1, 2, 3, 4, 5)  # classes of CIFAR-10
UNSEEN = (6, 7, 8, 9)
SIZE = 64  # pixels that EfficientNet sees
PER_CLASS = {"train": 300, "valid": 100, "test": 100}  # images

JOBS = tuple(
    SpecialiseJob(
        task=f"experiments.finetuning:seen_{shots}",
        held_out=",".join(
            f"experiments.finetuning:{name}_{shots}" for name in ("unseen", "fashion", "digits")
        ),
        num_steps=50,
        minutes=2,
        baselines="adam,adamw,adamw-groups,schedule-free-adamw,lion,muon",
        seeds=20,
        workers=2,
        out=OUT / f"{shots}-images",
    )
    for shots in (20, 100)
)


@cache
def features(name: str) -> datasets.Dataset:
    """Features of some images of each class ``[n, 1280]``; they are kept in a file.

    Args:
      name: of a prepared data set of images.
    """
    file = OUT / f"features-{name}.npz"
    if not file.exists():
        net, variables = networks.load_efficientnet_lite0()
        images = _some(datasets.load(name))
        made = tasks.cached(net.clone(num_classes=0, size=SIZE), variables, images)
        arrays = {f"{split}-{k}": x for split, xy in made.splits.items() for k, x in xy.items()}
        payload = io.BytesIO()
        np.savez(payload, **arrays)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, payload.getvalue())
    with np.load(file) as arrays:
        splits: dict[Split, Batch] = {
            split: {k: jnp.asarray(arrays[f"{split}-{k}"]) for k in "xy"} for split in SPLITS
        }
    return datasets.Dataset(name=f"features of {name}", splits=splits, num_classes=10)


def _some(data: datasets.Dataset) -> datasets.Dataset:
    """The first images of each class, in three colours."""
    splits = {}
    for split, (x, y) in (
        (s, (np.asarray(d["x"]), np.asarray(d["y"]))) for s, d in data.splits.items()
    ):
        rows = np.concatenate([np.flatnonzero(y == k)[: PER_CLASS[split]] for k in range(10)])
        x = x[rows] if x.ndim == 4 else x[rows][..., None]
        splits[split] = {"x": np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x, "y": y[rows]}
    return data._replace(splits=splits)


def _family(name: str, classes: tuple[int, ...], shots: int) -> TaskFamily:
    return tasks.few_class(
        nn.Dense(3), features(name), None, classes=classes, ways=3, shots=shots, batch_size=32
    )


# Three of the classes of CIFAR-10 on which L3RS is meta-trained, and of the others.
seen_20 = partial(_family, "cifar10", SEEN, 20)
seen_100 = partial(_family, "cifar10", SEEN, 100)
unseen_20 = partial(_family, "cifar10", UNSEEN, 20)
unseen_100 = partial(_family, "cifar10", UNSEEN, 100)
fashion_20 = partial(_family, "fashion_mnist", tuple(range(10)), 20)
fashion_100 = partial(_family, "fashion_mnist", tuple(range(10)), 100)
digits_20 = partial(_family, "mnist", tuple(range(10)), 20)
digits_100 = partial(_family, "mnist", tuple(range(10)), 100)


def main() -> int:
    """Runs all parts."""
    console = Console()
    start = time.perf_counter()
    for name in ("cifar10", "fashion_mnist", "mnist"):
        console.print(f"features of {name}: {len(features(name).splits['train']['y'])} images")
    for job in JOBS:
        print_summary(report(specialise(job, console)), console)
    console.print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
