"""The command `metaopt`, or one line that names the extra which the command needs."""

import sys

from metaopt.core.extras import MissingExtra, optional_imports


def main() -> int:
    """Runs the command line; without its packages, one line on stderr and exit code 2."""
    try:
        with optional_imports("train", needed_by="the command metaopt"):
            from metaopt import cli
    except MissingExtra as error:
        print(f"metaopt: {error}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
