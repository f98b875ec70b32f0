"""The main experiment, on real 8x8 images of digits: meta-train, guard, evaluate, report.

Claim: meta-training makes optimizers that beat tuned SGD and Adam on held-out runs of the task they
were trained on (the best learned one reaches tuned Adam's final loss in fewer steps). Guards keep
them safe where they were not trained: on runs ten times longer, and on another problem.

    make run      # or: python -m experiments.digits

Needs no data. Takes 3 minutes on 2 CPU cores; it resumes. Writes the meta-trainings, the records of
the evaluation and its report to runs/digits.
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from metaopt import optimizers
from metaopt.core.processes import in_processes
from metaopt.jobs.evaluate import EvaluateJob, evaluate_suite
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import NESConfig, TBPTTConfig
from metaopt.report import print_summary, report

OUT = Path("runs/digits")

L3RS = TrainJob(
    task="digits",
    learned=optimizers.L3RS(),
    method=NESConfig(population=32, tasks=4, sigma=0.05, lr=1e-2, half_life=200),
    steps=150,
    out=OUT / "L3RS",
)
L2O = TrainJob(
    task="digits",
    learned=optimizers.LSTM(p=7.0),
    method=TBPTTConfig(tasks=2, objective="log", average=0.98, lr=3e-3, half_life=150, clip=1.0),
    steps=240,
    validate_every=40,
    out=OUT / "L2O",
)
EVALUATION = EvaluateJob(
    checkpoints=(L3RS.out, L2O.out), suite="digits", seeds=8, workers=2, out=OUT / "evaluation"
)


def main() -> int:
    """Runs all three parts."""
    console = Console()
    start = time.perf_counter()
    console.print(f"[bold]1/3[/] meta-train {L3RS.out} and, beside it, {L2O.out}")
    with console.status("meta-training: the metrics.jsonl of each folder grows"):
        in_processes(meta_train, [(L3RS,), (L2O,)], workers=2)
    console.print(f"[bold]2/3[/] tune the baselines and evaluate: {EVALUATION.out}")
    with console.status("evaluating"):
        evaluate_suite(EVALUATION)
    console.print("[bold]3/3[/] report")
    print_summary(report(EVALUATION.out), console)
    console.print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
