"""The same as `gpt2lite bench`: see its --help."""

import sys

from gpt2lite.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
