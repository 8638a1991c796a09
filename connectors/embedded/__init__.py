"""The local stack: the real parts, as supervised child processes on loopback."""
