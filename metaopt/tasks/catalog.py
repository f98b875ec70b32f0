"""Tasks by name. A user's own task is named ``package.module:function``."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from metaopt import datasets, tasks
from metaopt.core.checks import check_known
from metaopt.core.files import cache_folder
from metaopt.core.named import describe, load_named
from metaopt.core.types import SPLITS, Task, TaskFamily, single
from metaopt.datasets import Dataset
from metaopt.tasks import networks
from metaopt.tasks.checking import check_family, check_start
from metaopt.tasks.pretraining import pretrained

WAYS, SIDE = 3, 28  # classes of a fine-tuning task; height and width of its images
HELD_OUT = 200  # examples per class that its results are read off
FEWER = 1000  # held-out examples of a task of the suite "general"


class NamedTask(NamedTuple):
    """A task that can be named on the command line.

    Attributes:
      make: builds the task. Data sets are read, and networks pretrained, when it is called.
      data: names of the data sets that must be prepared.
      head: name of the read-out layer in the params, for optimizers that train only this layer.
    """

    make: Callable[[], Task | TaskFamily]
    data: tuple[str, ...] = ()
    head: str = "Dense_0"


def _mlp(
    data: str,
    *hidden: int,
    batch_size: int = 128,
    activation=nn.relu,
    style: networks.Init = "torch",
):
    def make() -> Task:
        loaded = datasets.load(data)
        net = networks.MLP((*hidden, loaded.num_classes), activation, style)
        return tasks.classification(net, loaded, batch_size=batch_size)

    return NamedTask(make, (data,), f"Dense_{len(hidden)}")


def _net(
    data: str,
    net: Callable[[int], nn.Module],
    head: str = "Dense_0",
    batch_size: int = 128,
    most_held_out: int | None = None,
):
    """Classification; `net` makes a network for a number of classes."""

    def make() -> Task:
        loaded = datasets.load(data)
        if most_held_out is not None:
            loaded = datasets.with_fewer_held_out(loaded, most_held_out)
        return tasks.classification(net(loaded.num_classes), loaded, batch_size=batch_size)

    return NamedTask(make, (data,), head)


def _mlp20(data: str) -> NamedTask:
    """LGL2O section 4, Meta Guard A.1: 20 sigmoid units, batches of 128."""
    return _mlp(data, 20, activation=nn.sigmoid)


def _sigmoid_cnn(num_classes: int) -> networks.CNN:
    """CNN-3 with the sigmoids of LGL2O's MLP; the paper does not name its activation."""
    return networks.CNN(num_classes, activation=nn.sigmoid)


def _resnet(norm: networks.Norm):
    return lambda num_classes: networks.small_resnet(num_classes, norm=norm)


def _planar_family() -> TaskFamily:
    return tasks.mlp_family([datasets.moons(), datasets.circles(), datasets.spirals()])


def _text(net: Callable[[int], nn.Module], *, held_out: int = 64) -> NamedTask:
    """Characters of Python's help topics; `net` makes a network for a number of tokens."""

    def make() -> Task:
        text = datasets.python_topics()
        return tasks.language_model(
            net(len(text.vocabulary)), text, batch_size=16, length=32, held_out=held_out
        )

    return NamedTask(make, head="head")


# A task of the suite "general", which has fewer held-out examples than its data set.
_general = partial(_net, batch_size=32, most_held_out=FEWER)


def _autoencoder(data: str, *hidden: int) -> NamedTask:
    def make() -> Task:
        loaded = datasets.with_fewer_held_out(datasets.load(data), FEWER)
        numbers = loaded.splits["train"]["x"][0].size
        net = networks.MLP((*hidden, numbers), init_style="flax")
        return tasks.autoencoder(net, loaded, batch_size=64)

    return NamedTask(make, (data,), f"Dense_{len(hidden)}")


def _mlp64x2(num_classes: int) -> networks.MLP:
    return networks.MLP((64, 64, num_classes), init_style="flax")


def _cnn2(num_classes: int) -> networks.CNN:
    """Two convolutions, for data on which the zoo's optimizers of CNN-3 were meta-trained."""
    return networks.CNN(num_classes, (16, 32), (3, 3), (2, 2), init_style="flax")


def _wide_cnn3(num_classes: int) -> networks.CNN:
    return networks.CNN(num_classes, (16, 32, 32), (3, 3, 3), (2, 2, 2), init_style="flax")


def _vit(patch: int):
    return lambda num_classes: networks.ViT(num_classes, patch, init_style="flax")


class ClassSplit(NamedTuple):
    """Classes of a data set for pretraining, meta-training and meta-testing."""

    pretrain: tuple[int, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]


def class_split(num_classes: int, *, seed: int = 0) -> ClassSplit:
    """A random half of the classes, a quarter and a quarter; the same for one seed."""
    order = tuple(int(c) for c in np.random.RandomState(seed).permutation(num_classes))
    half = num_classes // 2
    middle = half + (num_classes - half) // 2
    return ClassSplit(pretrain=order[:half], train=order[half:middle], test=order[middle:])


def _garments_and_digits() -> Dataset:
    """MNIST and FashionMNIST as one set of 20 classes: the domain of pretraining."""
    return datasets.union(datasets.load("mnist"), datasets.load("fashion_mnist"))


def _small_digits() -> Dataset:
    """scikit-learn's digits, enlarged: another domain."""
    return datasets.resized(datasets.digits(), SIDE)


def _finetuning(
    data: Callable[[], Dataset],
    classes: str,
    start: Callable[[], Dataset] | None,
    needs: tuple[str, ...] = ("mnist", "fashion_mnist"),
) -> NamedTask:
    """Few-class tasks with a pretrained CNN-3.

    Args:
      data: where the classes of the tasks come from.
      classes: which part of them: a field of `ClassSplit`.
      start: what the network is pretrained on; None: it starts from random params.
      needs: names of the data sets that must be prepared.
    """

    def make() -> TaskFamily:
        loaded, params = data(), None
        if start is not None:
            source = start()
            seen = datasets.only_classes(source, class_split(source.num_classes).pretrain)
            net = networks.CNN(seen.num_classes)
            params, _ = pretrained(cache_folder() / "pretrained", net, seen)
        return tasks.few_class(
            networks.CNN(WAYS),
            loaded,
            params,
            head="Dense_0",
            classes=getattr(class_split(loaded.num_classes), classes),
            ways=WAYS,
            held_out=HELD_OUT,
        )

    return NamedTask(make, needs)


def _tiny_imagenet50() -> Task:
    """LGL2O section 4.5: 50 random classes of 200."""
    data = datasets.load("tiny_imagenet")
    chosen = np.random.RandomState(0).permutation(data.num_classes)[:50]
    data = datasets.only_classes(data, [int(c) for c in chosen])
    return tasks.classification(networks.cnn5(50), data)


TASKS: dict[str, NamedTask] = {
    "digits": _mlp("digits", 32, batch_size=64),
    "digits-wide": _mlp("digits", 128, batch_size=64),
    "digits-deep": _mlp("digits", 32, 32, 32, batch_size=64),
    "digits-linear": _mlp("digits", batch_size=64),
    "digits-small-batch": _mlp("digits", 32, batch_size=8),
    "digits-mlp20": _mlp20("digits"),
    "digits-cnn": _net("digits", lambda n: networks.CNN(n, (8, 16), (3, 3), (2, 1)), batch_size=64),
    "digits-resnet": _net("digits", _resnet("group"), "head", 64),
    "digits-resnet-batchnorm": _net("digits", _resnet("batch"), "head", 64),
    "moons": _mlp("moons", 32, batch_size=64),
    "circles": _mlp("circles", 32, batch_size=64),
    "spirals": _mlp("spirals", 32, batch_size=64),
    "moons-mlp20": _mlp20("moons"),
    "circles-mlp20": _mlp20("circles"),
    "spirals-mlp20": _mlp20("spirals"),
    "planar-family": NamedTask(_planar_family, head="Dense_1"),
    "python-text": _text(lambda n: networks.Transformer(n, max_length=32)),
    "text-transformer": _text(
        lambda n: networks.Transformer(n, heads=4, init_style="flax"), held_out=128
    ),
    "text-gru": _text(lambda n: networks.GRU(n, init_style="flax"), held_out=128),
    "breast-cancer": _mlp("breast_cancer", 32, 32, batch_size=32, style="flax"),
    "digits-vit": _general("digits", _vit(4), "head"),
    "digits-autoencoder": _autoencoder("digits", 32, 8, 32),
    "quadratic": NamedTask(lambda: tasks.quadratic(dim=32, condition=100.0), head=""),
    "mnist-mlp20": _mlp20("mnist"),
    "mnist-cnn3": _net("mnist", networks.CNN),
    "mnist-cnn3-sigmoid": _net("mnist", _sigmoid_cnn),
    "mnist-mlp128x3": _mlp("mnist", 128, 128, 128, style="flax"),
    "fashion-mlp20": _mlp20("fashion_mnist"),
    "fashion-cnn3": _net("fashion_mnist", networks.CNN),
    "fashion-cnn3-sigmoid": _net("fashion_mnist", _sigmoid_cnn),
    "fashion-mlp128x2": _mlp("fashion_mnist", 128, 128, style="flax"),
    "fashion-mlp64x2": _general("fashion_mnist", _mlp64x2, "Dense_2", batch_size=64),
    "fashion-cnn2": _general("fashion_mnist", _cnn2),
    "fashion-vit": _general("fashion_mnist", _vit(7), "head"),
    "mnist-autoencoder": _autoencoder("mnist", 64, 16, 64),
    "mnist-cnn": _general("mnist", _wide_cnn3),
    "mnist-resnet": _general("mnist", _resnet("batch"), "head", batch_size=16),
    "cifar10-cnn": _general("cifar10", _wide_cnn3),
    "cifar10-resnet": _general("cifar10", _resnet("batch"), "head", batch_size=16),
    "cifar10-cnn3": _net("cifar10", networks.CNN),
    "tiny_imagenet50-cnn5": NamedTask(_tiny_imagenet50, ("tiny_imagenet",)),
    "finetune": _finetuning(_garments_and_digits, "train", _garments_and_digits),
    "finetune-A": _finetuning(_garments_and_digits, "test", _garments_and_digits),
    "finetune-B": _finetuning(_small_digits, "test", _garments_and_digits),
    "finetune-C": _finetuning(_garments_and_digits, "test", _small_digits),
    "finetune-D": _finetuning(_small_digits, "test", _small_digits, ()),
    "finetune-E": _finetuning(_garments_and_digits, "test", None),
}


def build(name: str) -> Task | TaskFamily:
    """The task `name`, or what a user's ``package.module:function`` returns.

    Raises:
      ValueError: the name is unknown, or the user's module or task fails.
    """
    if ":" not in name:
        check_known("task", name, TASKS)
        return TASKS[name].make()
    make = load_named("task", name)
    try:
        task = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"task {name!r}: {describe(error)}") from error
    if not isinstance(task, Task | TaskFamily):
        raise ValueError(
            f"task {name!r}: the function must return a metaopt.Task or metaopt.TaskFamily, "
            f"got {type(task).__name__}."
        )
    checked = task if isinstance(task, TaskFamily) else single(task)
    check_family(f"task {name!r}", checked, SPLITS)
    check_start(f"task {name!r}", checked)
    return task


def family(name: str) -> TaskFamily:
    """`build`, as a distribution of tasks."""
    task = build(name)
    return task if isinstance(task, TaskFamily) else single(task)


def head(name: str) -> str:
    """Name of the task's read-out layer in the params; empty where none is known."""
    return TASKS[name].head if name in TASKS else ""


def missing_data(name: str) -> list[str]:
    """Names of the data sets that the task `name` needs and that are not prepared."""
    if name not in TASKS:
        return []
    return [data for data in TASKS[name].data if datasets.state(data) == "not prepared"]
