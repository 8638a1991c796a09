"""Run a command that the kernel ends when the process that started it ends, however that one ended.

A script of its own, run before the command, because code between fork and exec of a threaded parent can deadlock.
Linux only (PR_SET_PDEATHSIG, which survives exec). The signal comes when the parent *thread* ends.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, argv: list[str]) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # the parent ended before prctl: nobody would send the signal
        sys.exit(1)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
