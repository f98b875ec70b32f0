"""L3RS (2026): figure 3, A to E, and the beyond-the-horizon runs, on few-class fine-tuning.

Claims: within the horizon L3RS is ahead of VeLO(ft) and of tuned Adam, and comparable to Adam
beyond it, where VeLO(ft) drops; other data or another pretraining change little; from a random
initialisation (E) L3RS does not beat the baselines.

    make reproduce-l3rs       # or: python -m experiments.l3rs [--only A] [--full]

Against the paper: CNN-3 pretrained on half of the 20 classes of MNIST and FashionMNIST together
(or on scikit-learn's digits) where the paper has ResNets on ImageNet; 3-way tasks; 10 seeds.
"""

from pathlib import Path

from experiments.reproduction import Figure, Reproduction, main


def figures(full: bool) -> list[Figure]:
    """The settings; nothing is longer with `full`: the paper's K is ours."""
    del full
    panels = {
        "A": ("new classes", "finetune-A", 100),
        "A-10": ("new classes, 10 steps", "finetune-A", 10),
        "A-500": ("new classes, beyond the horizon", "finetune-A", 500),
        "B": ("other data", "finetune-B", 100),
        "C": ("other pretraining", "finetune-C", 100),
        "D": ("other data and pretraining", "finetune-D", 100),
        "E": ("no pretraining", "finetune-E", 100),
    }
    return [
        Figure(
            name=name,
            title=f"Fig. 3 {name}: {title}",
            task=task,
            num_steps=num_steps,
            measure_every=max(1, num_steps // 500),
            learned=("l3rs-finetune-cnn", "velo-small"),
            guards=("race",),
            fallbacks=("adam",),
            baselines=("sgd", "adam", "adam-l3rs", "adam-l3rs-head"),
        )
        for name, (title, task, num_steps) in panels.items()
    ]


PAPER = Reproduction("L3RS, figure 3", figures, seeds=(10, 25), out=Path("docs/results/l3rs"))

if __name__ == "__main__":
    main(PAPER, "experiments.l3rs")
