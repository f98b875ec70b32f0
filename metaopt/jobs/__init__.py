"""One module per command: its frozen settings, and `run`, which does what it says.

`metaopt.cli` imports the module of the command that is given, and no other.
"""

from metaopt.core.extras import optional_imports

with optional_imports("train", needed_by="metaopt.jobs"):
    import tyro as tyro
