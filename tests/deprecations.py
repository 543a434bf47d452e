"""What libraries are going to drop must not be called by us: their warnings are errors where they name our modules.

`pyproject.toml` says so for the process of the tests; this does in Ray's worker processes.
"""

import warnings

OURS = r"(dreambooth|pipelines|serve|tests)\b"


def raise_at_our_calls() -> None:
    """Make them errors in this process; Ray calls it in each of its workers as they start."""
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("error", category=category, module=OURS)
