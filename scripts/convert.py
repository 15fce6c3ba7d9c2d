"""The same as `gpt2lite convert`: see its --help."""

import sys

from gpt2lite.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
