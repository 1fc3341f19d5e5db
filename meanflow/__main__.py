"""`python -m meanflow` is the command `meanflow`."""

import sys

from .cli import main

sys.exit(main())
