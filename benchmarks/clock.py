"""A process that has imported nothing yet."""

from __future__ import annotations

import time


def importing() -> float:
    """Return the seconds that `import fedlab_kit` takes after `import torch`."""
    import torch  # noqa: F401

    began = time.perf_counter()
    import fedlab_kit  # noqa: F401

    return time.perf_counter() - began
