"""``python -m jlrp`` and the command ``jlrp``."""

import sys


def main() -> None:
    try:
        from jlrp import cli
    except ImportError as error:
        sys.exit(f"The command needs {error.name}: pip install 'jlrp[jobs]'")
    cli.main(prog_name="jlrp")


if __name__ == "__main__":
    main()
