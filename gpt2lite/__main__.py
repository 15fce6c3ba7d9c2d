"""`python -m gpt2lite`, and `gpt2lite`: the command, and what Ctrl-C does while even that is imported."""

import sys


def main() -> int:
    """Run the command, and return its exit code."""
    try:
        from gpt2lite.cli import main

        return main()
    except KeyboardInterrupt:
        print("\ngpt2lite: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
