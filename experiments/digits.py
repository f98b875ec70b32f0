"""The main experiment, on real 8x8 images of digits: specialise, guard, evaluate, report.

Claim: L3RS, specialised to runs of 30 to 1000 steps by a search of a minute, needs fewer steps than
tuned Adam on held-out runs of its task, short and long. `race` beside tuned Muon, the best
baseline, is not above Muon's own run by more than noise, also on data and on a network that L3RS
has not seen.

    make run      # or: python -m experiments.digits

Needs no data. Takes some minutes on 2 CPU cores; it resumes. Writes the optimizer, the records of
the evaluation and its report to runs/digits.
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from metaopt.jobs.evaluate import EvaluateJob, evaluate_suite
from metaopt.jobs.specialise import SpecialiseJob, search_and_train
from metaopt.report import print_summary, report

OUT = Path("runs/digits")

JOB = SpecialiseJob(
    task="digits",
    bases="adam,lion,muon",
    any_network=True,
    num_steps=1000,
    min_steps=30,
    points=96,
    minutes=0.0,
    out=OUT,
)
EVALUATION = EvaluateJob(
    checkpoints=(JOB.start,),
    suite="digits",
    seeds=8,
    workers=2,
    out=OUT / "evaluation",
)


def main() -> int:
    """Runs all three parts."""
    console = Console()
    start = time.perf_counter()
    console.print(f"[bold]1/3[/] specialise {JOB.start}")
    search_and_train(JOB, console)
    console.print(f"[bold]2/3[/] tune the baselines and evaluate: {EVALUATION.out}")
    with console.status("evaluating"):
        evaluate_suite(EVALUATION)
    console.print("[bold]3/3[/] report")
    print_summary(report(EVALUATION.out), console)
    console.print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
