"""A batch job, metered and gated: `python job.py FILE...` counts words until its account's limit is reached."""

import asyncio
import os
import sys
from itertools import islice
from pathlib import Path

from tollway import Denied, Emitter, Gate, Meter, Principal, run


async def main(paths: list[str]) -> int:
    principal = Principal("client", os.environ["CLIENT"], os.environ["ACCOUNT"])
    async with (
        Emitter(os.environ["TOLLWAY_KAFKA_BOOTSTRAP"]) as emitter,
        Gate(os.environ["TOLLWAY_REDIS_URL"], emitter, deadline_s=2) as gate,
    ):
        meter = Meter(emitter, gate=gate, principal=principal, surface="agent")
        with run(f"words-{os.getpid()}", agent="word-counter"):
            for path in paths:
                try:
                    async with meter.observe("count words", ask={"words": (1_000, 1)}) as call:
                        words = list(islice(Path(path).read_text().split(), call.granted("words")))
                        call.add(words=len(words))
                        print(path, len(words))
                except Denied as denied:
                    print(path, denied.problem["detail"], file=sys.stderr)
                    return 1
                finally:
                    await meter.flush(10)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
