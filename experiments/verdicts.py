"""Decides each claim of the papers on the committed records, and writes the table of verdicts.

    python -m experiments.verdicts

Takes some seconds. Reads the records in docs/results and writes docs/results/README.md. All numbers
are computed from the records; the reasons and the summary are written by hand.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import l3rs, lgl2o, meta_guard
from experiments.checks import Claim, short_name
from experiments.figure_records import FigureRecords
from metaopt.core.files import write_whole
from metaopt.evaluation.records import INDEX, RECORD, read_index

RESULTS = Path("docs/results")
PAPERS = {"lgl2o": lgl2o, "meta-guard": meta_guard, "l3rs": l3rs}
HEAD = """# What the papers claim, and what came out here

Each line is decided by `python -m experiments.verdicts` from the records beside this page; the
checks are in `experiments/`. Real MNIST and FashionMNIST, runs shortened to what 2 CPU cores can
do; the scale of each reproduction against its paper's stands in the experiment's first lines.
The figures are not committed: `make docs` draws those of this page from the records, and
`metaopt report docs/results/NAME` draws all of an experiment. Baselines are tuned for each task and
length of run; LGL2O's paper did it once for all of its figures. Here and in the
records of the suites, guards are given additional mini-batches to validate on, as in the papers;
`race` is in its old form: `race(n_c=10, smoothing=0, margin=0, patience=1, budget=1)`.

"reproduced": all parts of the claim hold; "partly": some do; "not": none. Claims of our own
("ours") concern what the papers do not have: `race`, and optimizers that were meta-trained on
longer runs.
"""

# What the tables below come to, for a reader who does not read them.
IN_SHORT = """
## In short

{counts}

- **LGL2O.** Its start is as in the paper: the learned optimizer is ahead of SGD for the first
  hundred steps, and the guard takes it. Its guarantee is not: LGL2O follows windows that the
  learned optimizer wins, and loses SGD's own run, which would have been ahead later. Failures of
  the unguarded optimizer are milder here than there, and our baselines are tuned for each task.
  `race` keeps SGD's run, and is above it by 1% at most.
- **Meta Guard.** AMG holds a learned optimizer that diverges, but SGD, tuned for each panel, ends
  lower. SMG's loss rises again in most panels, to chance in some: it keeps one of two points, even
  if both are worse than before.
- **L3RS.** It is ahead of Adam and of fine-tuned VeLO at fine-tuning, within the lengths of runs
  that it was trained for and on other data. That it begins with Adam and ends with SGD, and that
  three averages of the gradient are better than one, we did not find.
"""
VERDICTS = ("reproduced", "partly", "not")
OURS = "ours"


def section(name: str, claims: Sequence[Claim]) -> list[str]:
    """The lines of one paper: how it was run, its figures, and the table of its claims.

    Args:
      name: folder of its records in `RESULTS`.
      claims: rows of the table.
    """
    index = read_index(RESULTS / name)
    job, environment = index["job"], index["environment"]
    lines = [
        f"\n## {job['suite']}\n",
        f"{job['seeds']} seeds; `{environment['command']}`; {environment['device']}. "
        f"[Tables]({name}/summary.md).\n",
        f"![Test loss of all optimizers, figure by figure]({name}/figures/comparison.png)\n",
    ]
    if index.get("training"):
        figure = f"{name}/figures/meta_training.png"
        lines.append(f"![Meta-training, loss by generation]({figure})\n")
    lines += [
        "| figure | claim | verdict | our numbers | why |",
        "|---|---|---|---|---|",
    ]
    for claim in claims:
        verdict, numbers = decide(claim, RESULTS / name / claim.figure)
        cells = (claim.source, claim.text, f"**{verdict}**", numbers, claim.reason)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def counts(names: Sequence[str]) -> list[str]:
    """A table of the numbers of verdicts, the papers' claims and ours apart."""
    lines = ["| claims | number | reproduced | partly | not |", "|---|---|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for name in names:
        title = read_index(RESULTS / name)["job"]["suite"]
        for claim in PAPERS[name].CLAIMS:
            row = OURS if claim.source == OURS else title
            verdict, _ = decide(claim, RESULTS / name / claim.figure)
            rows.setdefault(row, []).append(verdict)
    for row, verdicts in sorted(rows.items(), key=lambda item: item[0] == OURS):
        numbers = [str(verdicts.count(verdict)) for verdict in VERDICTS]
        lines.append(f"| {row} | {len(verdicts)} | {' | '.join(numbers)} |")
    return lines


def decide(claim: Claim, folder: Path) -> tuple[str, str]:
    """The verdict and our numbers; "not run yet" where records are missing.

    Args:
      claim: the claim.
      folder: of the records that decide it.
    """
    if not (folder / (RECORD if claim.figure else INDEX)).exists():
        return "not run yet", "–"
    records = FigureRecords(folder)
    try:
        return claim.check(records)
    except KeyError as error:
        name = error.args[0]
        if name in (records.curves if claim.figure else records.training):
            raise
        return "not run yet", f"no curves of {short_name(str(name))}"


def main() -> None:
    """Writes the page."""
    names = [name for name in PAPERS if (RESULTS / name).exists()]
    lines = [HEAD, IN_SHORT.strip().format(counts="\n".join(counts(names)))]
    for name in names:
        lines += section(name, PAPERS[name].CLAIMS)
    write_whole(RESULTS / "README.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
