"""How a command ends: a user's error is one line and exit status 2."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

# What a user's input can cause: shown as one line. Anything else is a bug in protojax and shows its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)


def guarded(function: Callable[[], int]) -> int:
    """Run a command; a user's error becomes one line on stderr and exit status 2 (PROTOJAX_TRACEBACK=1 shows all)."""
    try:
        return function()
    except USER_ERRORS as error:
        if os.environ.get("PROTOJAX_TRACEBACK"):
            traceback.print_exc()
        print(f"protojax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
