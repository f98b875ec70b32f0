"""metaopt: learned optimizers that are safe to use."""

__version__ = "0.1.0"
