"""Benchmarks: what the library costs, as ratios of times measured within one run.

A wall-clock time says little: another machine, or the same machine under load, gives another one.
Each benchmark therefore times what it measures and its reference in turn, forms the ratio within
each round, and reports the median over rounds. Each is a module with `run`, which returns a record
of plain JSON data, and `table`, which renders a record:

    python -m benchmarks step     one update of each learned optimizer, against one of Adam
    python -m benchmarks guards   one window of each guard, against the parts it consists of
    python -m benchmarks meta     meta-training, against bare SGD; two processes, against one
"""
