"""The main experiment, on real 8x8 images of digits: meta-train, guard, evaluate, report.

Claim: L3RS, meta-trained for some minutes on runs of 30 to 1000 steps, needs fewer steps than tuned
Adam on held-out runs of its task, short and long. `race` beside tuned Muon, the best baseline, is
not above Muon's own run, also on a deeper network, where L3RS fails. It is level with Muon: L3RS
gains over Adam here, not over Muon.

    make run      # or: python -m experiments.digits

Needs no data. Takes 4 to 8 minutes on 2 CPU cores; it resumes. Writes the meta-training, the
records of the evaluation and its report to runs/digits.
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from metaopt import optimizers
from metaopt.jobs.evaluate import EvaluateJob, evaluate_suite
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import NESConfig
from metaopt.report import print_summary, report

OUT = Path("runs/digits")

L3RS = TrainJob(
    task="digits",
    learned=optimizers.L3RS(
        base=("sgd", "adam", "lion"), variant="none", hidden=(16,), lambda_0=0.3
    ),
    method=NESConfig(population=16, tasks=2, min_steps=30, max_steps=1000, objective="anytime"),
    steps=500,
    validate_every=50,
    validate_on="trajectory",
    out=OUT / "L3RS",
)
EVALUATION = EvaluateJob(
    checkpoints=(L3RS.out,),
    suite="digits",
    seeds=8,
    workers=2,
    out=OUT / "evaluation",
)


def main() -> int:
    """Runs all three parts."""
    console = Console()
    start = time.perf_counter()
    console.print(f"[bold]1/3[/] meta-train {L3RS.out}")
    meta_train(L3RS)
    console.print(f"[bold]2/3[/] tune the baselines and evaluate: {EVALUATION.out}")
    with console.status("evaluating"):
        evaluate_suite(EVALUATION)
    console.print("[bold]3/3[/] report")
    print_summary(report(EVALUATION.out), console)
    console.print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
