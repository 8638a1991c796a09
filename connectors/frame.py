"""One spooled event as bytes: magic, length, CRC-32, then when it was appended, sequence, lane, key, value.

Little-endian. `length` and the checksum are those of everything behind the checksum. The lane, not the partition, is kept:
partition counts change.
"""

import struct
from zlib import crc32

from tollway.schemas.codec import VALUE_BYTES_MAX

Frame = tuple[int, int, int, bytes, bytes]
"""(appended_ms, sequence, lane, key, value)"""

MAGIC = b"\xf4\x7a"  # no UTF-8 text holds it
_HEAD = struct.Struct("<2sII")
_BODY = struct.Struct("<QQBB")
_WHOLE = struct.Struct("<2sIIQQBB")
KEY_BYTES_MAX = 255
FRAME_BYTES_MAX = _WHOLE.size + KEY_BYTES_MAX + VALUE_BYTES_MAX


def pack(appended_ms: int, sequence: int, lane: int, key: bytes, value: bytes) -> bytes:
    """One frame. Raises struct.error where a number or the key does not fit."""
    body = _BODY.pack(appended_ms, sequence, lane, len(key)) + key + value
    return _HEAD.pack(MAGIC, len(body), crc32(body)) + body


def unpack(data: bytes, start: int = 0) -> tuple[list[Frame], int]:
    """The whole, unbroken frames that follow each other from `start`, and where the last of them ends."""
    frames: list[Frame] = []
    add, fields, checksum_of = frames.append, _WHOLE.unpack_from, crc32
    size, head, least = len(data), _HEAD.size, _WHOLE.size
    while start + least <= size:
        magic, length, checksum, appended_ms, sequence, lane, key_length = fields(data, start)
        end, key_at = start + head + length, start + least
        value_at = key_at + key_length
        if magic != MAGIC or end > size or value_at > end or checksum_of(data[start + head : end]) != checksum:
            break
        add((appended_ms, sequence, lane, data[key_at:value_at], data[value_at:end]))
        start = end
    return frames, start


def next_whole(data: bytes, start: int) -> int:
    """Where the first whole, unbroken frame at or behind `start` begins; the end of `data` when there is none."""
    while (start := data.find(MAGIC, start)) >= 0:
        # Cut to one frame's length: else a long unbroken run would be unpacked only to be thrown away.
        if unpack(data[start : start + FRAME_BYTES_MAX])[0]:
            return start
        start += 1
    return len(data)


def torn(rest: bytes) -> bool:
    """Whether `rest` is the beginning of one frame whose write was cut short: nothing in it contradicts that."""
    if len(rest) < _HEAD.size:
        return rest[:2] == MAGIC[: len(rest[:2])]
    magic, length, _ = _HEAD.unpack_from(rest)
    return bool(magic == MAGIC and len(rest) < _HEAD.size + length <= FRAME_BYTES_MAX)
