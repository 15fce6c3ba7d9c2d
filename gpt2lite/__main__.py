"""`python -m gpt2lite` is `gpt2lite`."""

import sys

from gpt2lite.cli import main

sys.exit(main())
