"""Optimizers on suites of tasks: curves, records, statistics, tuned baselines."""
