"""Starts a script on two gloo processes."""

import os
import subprocess
import sys
import warnings

ABORTED = "Signal 6 (SIGABRT)"


def two_ranks(script, *arguments):
    """The finished launch of `script` by torchrun, its output kept.

    Twice, in whole suites, a rank ended in SIGABRT and no cause was found. One way to it is known: ranks that reduce
    different sums, as an auxiliary update without examples did until it was mended. A launch that aborts is repeated once, and
    what it said is shown as a warning; an error of Python, or a second abort, is a failure as ever.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [str(argument) for argument in arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "TORCHELASTIC_ERROR_FILE": ""}
    for attempt in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if attempt or ABORTED not in done.stderr:
            break
        warnings.warn(f"A rank of {command[6:]} aborted, and is started again:\n{done.stderr}", stacklevel=2)
    return done
