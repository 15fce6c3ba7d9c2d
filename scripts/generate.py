"""The same as `gpt2lite generate`: see its --help."""

import sys

from gpt2lite.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
