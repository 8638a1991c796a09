"""Where audit blocks end: a function of the log alone, so that a retry, a restart or a zombie cuts the same block (design §7)."""

from collections.abc import Iterable

BLOCK_OFFSETS = 16_384
BLOCK_BYTES_MAX = 16 * 1024 * 1024


class BlockCutter:
    """Feeds on records in offset order; says after each how many of those not yet cut make a whole block.

    A block ends before the first record of a new step once it holds a record that is no tick, after an offset with
    (offset + 1) mod 16,384 = 0, and after 16 MiB of values.
    """

    def __init__(self, log_time_ms: int, step_ms: int) -> None:
        self._log_time_ms, self._step_ms = log_time_ms, step_ms
        self._count = self._bytes = 0
        self._solid = False

    def feed(self, records: Iterable[tuple[int, int, int, bool]]) -> list[int]:
        """Lengths of the blocks completed by these (offset, append ms, value bytes, is tick) records."""
        blocks: list[int] = []
        for offset, append_ms, size, is_tick in records:
            step = self._log_time_ms // self._step_ms
            self._log_time_ms = max(self._log_time_ms, append_ms)
            if self._solid and self._log_time_ms // self._step_ms != step:
                self._end(blocks)
            self._count += 1
            self._bytes += size
            self._solid = self._solid or not is_tick
            if (offset + 1) % BLOCK_OFFSETS == 0 or self._bytes >= BLOCK_BYTES_MAX:
                self._end(blocks)
        return blocks

    def _end(self, blocks: list[int]) -> None:
        blocks.append(self._count)
        self._count = self._bytes = 0
        self._solid = False
