"""One file per figure or table: its configuration, its claim, and how to run it."""
