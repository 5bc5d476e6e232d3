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
        return _leave(function(), "")
    except USER_ERRORS as error:
        if os.environ.get("PROTOJAX_TRACEBACK"):
            traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"protojax: error: {text}", file=sys.stderr)
        return _leave(2, text)
    except BaseException as error:
        if "protojax.distributed" in sys.modules:  # with several processes it ends here: the others must hear of it
            from protojax import distributed

            if distributed.several():
                traceback.print_exc()
                _leave(1, f"{type(error).__name__}: {error}")
        raise


def _leave(status: int, reason: str) -> int:
    """What is to be said to the other processes of the run, if there are any."""
    if "protojax.distributed" not in sys.modules:
        return status
    from protojax import distributed

    return distributed.leave(status, reason)
