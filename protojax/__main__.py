"""`python -m protojax` is the console script."""

import sys

from protojax.cli import main

sys.exit(main())
