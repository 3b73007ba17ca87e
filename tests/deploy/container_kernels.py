"""A user's kernels as a container finds them: in a volume, or in an image on top of ours."""

import subprocess
import sys
import time

import numpy as np
from jaxtyping import Float64, Int64

from unlatch import kernel


@kernel
def rests(x: Float64[np.ndarray, "n"], *, seconds: float = 0.0) -> Float64[np.ndarray, "n"]:
    """Return twice `x`, after a while."""
    time.sleep(seconds)
    return 2 * x


@kernel
def leaves_an_orphan() -> Int64[np.ndarray, ""]:
    """Start a process in a session of its own and end its parent; return the parent's exit code."""
    sleeps = "import time; time.sleep(600)"
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeps!r}], start_new_session=True)"
    return np.array(subprocess.run([sys.executable, "-c", starts], check=False).returncode)
