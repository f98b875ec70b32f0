"""Suites of tasks, as data, for ``metaopt evaluate CHECKPOINT... --suite NAME``."""

from collections.abc import Sequence
from typing import NamedTuple


class SuiteTask(NamedTuple):
    """A task of a suite.

    Attributes:
      title: title in reports.
      task: name in `metaopt.tasks.catalog.TASKS`.
      num_steps: optimizer steps per run.
      measure_every: windows between two measurements.
      velodrome: name of the published reference curves of the same task, or empty.
      stand_in: name of the task that is run instead where the data of `task` are not prepared and
        those of the stand-in are; empty: none. The title then says so.
    """

    title: str
    task: str
    num_steps: int
    measure_every: int = 1
    velodrome: str = ""
    stand_in: str = ""


def fitted(task: SuiteTask, num_steps: int | None, window: int) -> SuiteTask:
    """The task with another number of steps, if given, and a matching `measure_every`.

    If the number of windows is not a multiple of `measure_every`, measurements are taken more
    often.

    Args:
      task: a task of a suite.
      num_steps: steps per run, or None for those of the task.
      window: optimizer steps per window.

    Raises:
      ValueError: when the steps are not a multiple of `window`.
    """
    steps = task.num_steps if num_steps is None else num_steps
    if steps % window:
        lower = steps - steps % window
        choices = " or ".join(str(n) for n in (lower, lower + window) if n)
        raise ValueError(
            f"{task.title}: {steps} steps are not whole windows of {window}; give another "
            f"--window, or --num-steps {choices}."
        )
    divisors = [n for n in range(1, task.measure_every + 1) if steps // window % n == 0]
    return task._replace(num_steps=steps, measure_every=max(divisors))


class Suite(NamedTuple):
    """A suite: tasks, and the defaults of the comparison.

    Attributes:
      about: one line that describes the suite.
      tasks: the tasks, in the order of reports.
      baselines: names of the tuned baselines, separated by commas.
      guards: names of the guards, separated by commas.
      fallback: name of the baseline that guards fall back to.
      seeds: runs per optimizer and task.
      adversaries: useless optimizers of `metaopt.optimizers.ADVERSARIES` that are guarded, too.
      tuning_seeds: runs per point of a baseline's grid.
    """

    about: str
    tasks: tuple[SuiteTask, ...]
    baselines: str = "sgd,adam"
    guards: str = "lgl2o,race"
    fallback: str = "sgd"
    seeds: int = 10
    adversaries: tuple[str, ...] = ()
    tuning_seeds: int = 3


OWN_STEPS = 1000  # of a run on a task that is in no suite, unless given


def suite_of(tasks: Sequence[str], num_steps: int | None = None) -> Suite:
    """A suite of single tasks, guarded with tuned Adam as the fallback.

    The title of a user's task is the name of its function, where the functions' names differ.

    Args:
      tasks: names of tasks, see `metaopt.tasks.catalog.build`.
      num_steps: optimizer steps per run; None: `OWN_STEPS`.
    """
    steps = OWN_STEPS if num_steps is None else num_steps
    names = [task.rpartition(":")[2] for task in tasks]
    titles = names if len(set(names)) == len(names) else tasks
    return Suite(
        "single tasks",
        tuple(
            SuiteTask(f"{title} ({steps} steps)", task, steps)
            for title, task in zip(titles, tasks, strict=True)
        ),
        baselines="adam,muon",
        guards="race",
        fallback="adam",
    )


def _lgl2o(about: str, *tasks: SuiteTask) -> Suite:
    """A suite with the baselines, grids and number of seeds of LGL2O's appendix E."""
    return Suite(
        about,
        tasks,
        baselines="sgd-lgl2o,adam-lgl2o,adam",
        guards="gl2o,lgl2o,race",
        fallback="sgd-lgl2o",
        seeds=5,
    )


# Title, task, stand-in, horizons; at those that two CPU cores can afford.
_GENERAL = (
    ("MLP on FashionMNIST", "fashion-mlp64x2", "", (200, 1000, 5000)),
    ("CNN on FashionMNIST", "fashion-cnn2", "", (200, 1000)),
    ("ViT on FashionMNIST", "fashion-vit", "", (200, 1000)),
    ("CNN on CIFAR-10", "cifar10-cnn", "mnist-cnn", (200, 1000)),
    ("ResNet with BatchNorm on CIFAR-10", "cifar10-resnet", "mnist-resnet", (200,)),
    ("autoencoder on MNIST", "mnist-autoencoder", "", (200, 1000, 5000)),
    ("transformer on text", "text-transformer", "", (200, 1000)),
    ("GRU on text", "text-gru", "", (200, 1000)),
    ("MLP on tabular data", "breast-cancer", "", (200,)),
    ("few-class fine-tuning", "finetune-A", "", (200,)),
)


def _general() -> tuple[SuiteTask, ...]:
    """The short runs first, with 20 measurements in each."""
    return tuple(
        SuiteTask(
            f"{title} ({steps} steps)",
            task,
            steps,
            measure_every=steps // 200,
            stand_in=stand_in,
        )
        for steps in (200, 1000, 5000)
        for title, task, stand_in, horizons in _GENERAL
        if steps in horizons
    )


SUITES: dict[str, Suite] = {
    "digits": Suite(
        "the main job: digits in short and long runs, other data, a deeper network",
        (
            SuiteTask("digits (100 steps)", "digits", 100),
            SuiteTask("digits (1000 steps)", "digits", 1000),
            SuiteTask("not seen: spirals (1000 steps)", "spirals", 1000),
            SuiteTask("hostile: a deeper network (1000 steps)", "digits-deep", 1000),
        ),
        baselines="adam,muon",
        guards="race",
        fallback="muon",
    ),
    "small": Suite(
        "12 diverse tasks, below 3 minutes on 2 cores",
        (
            SuiteTask("MLP on digits", "digits", 100),
            SuiteTask("wide MLP on digits", "digits-wide", 100),
            SuiteTask("deep MLP on digits", "digits-deep", 100),
            SuiteTask("softmax regression on digits", "digits-linear", 100),
            SuiteTask("batches of 8 digits", "digits-small-batch", 100),
            SuiteTask("sigmoid MLP-20 on digits", "digits-mlp20", 100),
            SuiteTask("CNN on digits", "digits-cnn", 50),
            SuiteTask("moons", "moons", 100),
            SuiteTask("circles", "circles", 100),
            SuiteTask("spirals", "spirals", 200),
            SuiteTask("planar sets, random widths and batches", "planar-family", 100),
            SuiteTask("noisy quadratic, condition 100", "quadratic", 100),
        ),
        guards="race",
        seeds=3,
    ),
    "general": Suite(
        "10 kinds of networks and data, at up to three horizons; some hours on 2 cores",
        _general(),
        baselines="adam,schedule-free-adamw,muon",
        guards="race",
        fallback="muon",
        seeds=5,
        tuning_seeds=2,
    ),
    "general-quick": Suite(
        "the same kinds of networks on data that need no files, in short runs",
        (
            SuiteTask("ViT on digits", "digits-vit", 50),
            SuiteTask("ResNet with BatchNorm on digits", "digits-resnet-batchnorm", 50),
            SuiteTask("autoencoder on digits", "digits-autoencoder", 50),
            SuiteTask("GRU on text", "text-gru", 50),
            SuiteTask("MLP on tabular data", "breast-cancer", 50),
        ),
        baselines="adam",
        guards="race",
        fallback="adam",
        seeds=3,
        tuning_seeds=1,
    ),
    "lgl2o-table1": _lgl2o(
        "LGL2O table 1: an optimizer of MLP-20 on MNIST, on other data and networks",
        SuiteTask("MLP-20 on MNIST", "mnist-mlp20", 1000, measure_every=5),
        SuiteTask("MLP-20 on FashionMNIST", "fashion-mlp20", 1000, measure_every=5),
        SuiteTask("MLP-20 on moons", "moons-mlp20", 1000, measure_every=5),
        SuiteTask("MLP-20 on circles", "circles-mlp20", 1000, measure_every=5),
        SuiteTask("MLP-20 on spirals", "spirals-mlp20", 2000, measure_every=10),
        SuiteTask("CNN-3 on MNIST", "mnist-cnn3", 500, measure_every=5),
        SuiteTask("CNN-3 on CIFAR-10", "cifar10-cnn3", 500, measure_every=5),
        SuiteTask(
            "CNN-5 on 50 classes of TinyImageNet", "tiny_imagenet50-cnn5", 500, measure_every=5
        ),
    ),
    "lgl2o-table2": _lgl2o(
        "LGL2O table 2: an optimizer of a CNN, on other networks and data",
        SuiteTask("CNN-3 on CIFAR-10", "cifar10-cnn3", 500, measure_every=5),
        SuiteTask("CNN-3 on MNIST", "mnist-cnn3", 500, measure_every=5),
        SuiteTask("CNN-3 on FashionMNIST", "fashion-cnn3", 500, measure_every=5),
        SuiteTask("MLP-20 on MNIST", "mnist-mlp20", 1000, measure_every=5),
        SuiteTask("MLP-20 on circles", "circles-mlp20", 1000, measure_every=5),
        SuiteTask("MLP-20 on spirals", "spirals-mlp20", 2000, measure_every=10),
    ),
    "meta-guard-fig1": Suite(
        "Meta Guard figure 1: in and out of distribution, SGD at a constant learning rate",
        (
            SuiteTask("CNN-3 on FashionMNIST", "fashion-cnn3", 1000, measure_every=5),
            SuiteTask("MLP-20 on FashionMNIST", "fashion-mlp20", 1000, measure_every=5),
            SuiteTask("CNN-3 on MNIST", "mnist-cnn3", 1000, measure_every=5),
        ),
        baselines="sgd-meta-guard,adam",
        guards="lgl2o,smg,amg,race",
        fallback="sgd-meta-guard",
        seeds=10,
    ),
    "l3rs-fig3": Suite(
        "L3RS figure 3: few-class fine-tuning, in and out of distribution",
        (
            SuiteTask("A: new classes", "finetune-A", 100),
            SuiteTask("A: new classes, beyond the horizon", "finetune-A", 500, measure_every=5),
            SuiteTask("B: other data", "finetune-B", 100),
            SuiteTask("C: other pretraining", "finetune-C", 100),
            SuiteTask("D: other data and pretraining", "finetune-D", 100),
            SuiteTask("E: no pretraining", "finetune-E", 100),
        ),
        baselines="sgd,adam,adam-l3rs,adam-l3rs-head",
        guards="race",
    ),
    "velodrome": Suite(
        "MLPs with a published reference curve over sweeps of Adam",
        (
            SuiteTask(
                title="MLP 128x3 on MNIST",
                task="mnist-mlp128x3",
                num_steps=1000,
                measure_every=5,
                velodrome="ImageMLP_Mnist_128x128x128_Relu",
            ),
            SuiteTask(
                title="MLP 128x2 on FashionMNIST",
                task="fashion-mlp128x2",
                num_steps=1000,
                measure_every=5,
                velodrome="ImageMLP_FashionMnist_Relu128x128",
            ),
        ),
        guards="race",
        seeds=3,
    ),
    "guards-adversarial": Suite(
        "useless optimizers under every guard: which guard ends where its fallback does",
        (
            SuiteTask("MLP-20 on digits", "digits-mlp20", 200, measure_every=2),
            SuiteTask("spirals", "spirals", 200, measure_every=2),
            SuiteTask("noisy quadratic, condition 100", "quadratic", 200, measure_every=2),
        ),
        guards="gl2o,lgl2o,race",
        seeds=5,
        adversaries=("nan", "inf", "huge", "ascent", "random", "late"),
    ),
}
