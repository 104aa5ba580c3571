"""C for a CPU, compiled by this machine's gcc in each process that calls for it, in some 0.4 s."""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import tempfile
from pathlib import Path

from fastdcgan.errors import first_line

log = logging.getLogger("fastdcgan")

# Not linked with OpenMP: torch has loaded it, so that is the one found, and its threads are torch's.
COMPILE = ("gcc", "-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC", "-c")
LINK = ("gcc", "-shared")


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The functions of a C file; None, and said once, where it cannot be compiled."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            compiled, library = f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"
            for command in ((*COMPILE, str(source), "-o", compiled), (*LINK, compiled, "-o", library)):
                # In a process group of its own: Ctrl-C is for training, which ends by itself, not for the compiler.
                subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", process_group=0)
            return ctypes.CDLL(library)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = first_line(getattr(error, "stderr", "").strip() or error)
        needs = "needs gcc, and a folder for temporary files that programs may run from"
        log.warning("%s cannot be compiled (%s): going on more slowly without. It %s", source.name, reason, needs)
        return None
