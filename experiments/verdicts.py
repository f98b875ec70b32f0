"""The verdict table: each claim of the papers against the committed records.

    python -m experiments.verdicts     # writes docs/results/README.md

Every number is computed from docs/results; only the reasons are words.
"""

from pathlib import Path

from experiments import l3rs, lgl2o, meta_guard
from experiments.checks import short
from experiments.panels import Claim, Panel
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
length of run; LGL2O's paper did it once for all of its figures.

"reproduced": all parts of the claim hold; "partly": some do; "not": none.
"""


def lines(name: str, claims: tuple[Claim, ...]) -> list[str]:
    """The table of one paper."""
    index = read_index(RESULTS / name)
    made, trained = index["environment"], bool(index.get("training"))
    found = [
        f"\n## {index['job']['suite']}\n",
        f"{index['job']['seeds']} seeds; `{made['command']}`; {made['device']}. "
        f"[Tables]({name}/summary.md).\n",
        f"![Test loss of all optimizers, figure by figure]({name}/figures/comparison.png)\n",
        *([f"![Meta-training, loss by generation]({name}/figures/meta_training.png)\n"] * trained),
        "| figure | claim | verdict | our numbers | why |",
        "|---|---|---|---|---|",
    ]
    for claim in claims:
        outcome, numbers = decided(RESULTS / name / claim.panel, claim)
        row = (claim.figure, claim.text, f"**{outcome}**", numbers, claim.reason)
        found.append(f"| {' | '.join(row)} |")
    return found


def decided(folder: Path, claim: Claim) -> tuple[str, str]:
    """The verdict and our numbers; "not run yet" where curves are missing."""
    if not (folder / (RECORD if claim.panel else INDEX)).exists():
        return "not run yet", "–"
    panel = Panel(folder)
    try:
        return claim.check(panel)
    except KeyError as missing:
        if missing.args[0] in (panel.curves if claim.panel else panel.training):
            raise
        return "not run yet", f"no curves of {short(str(missing.args[0]))}"


def main() -> None:
    """Writes the page."""
    text = [HEAD]
    for name, paper in PAPERS.items():
        if (RESULTS / name).exists():
            text += lines(name, paper.CLAIMS)
    write_whole(RESULTS / "README.md", ("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    main()
