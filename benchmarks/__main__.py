"""All parts in turn: `python -m benchmarks [--quick] [--keep] [--json]`, then the page."""

import argparse
import json
import subprocess
import sys
import time

from benchmarks.machine import say

PARTS = ("fold", "million", "groups", "latency", "audit", "emit", "apply", "gate", "asgi")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that all works")
    parser.add_argument("--keep", action="store_true", help="write docs/benchmarks/*.json and docs/benchmarks.md")
    parser.add_argument("--json", action="store_true", help="one JSON object: part → figures")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
    given = parser.parse_args()
    began, found, failed = time.monotonic(), {}, []
    for name in given.only:
        say(f"{time.monotonic() - began:5.0f} s  {name}")
        options = [f"--{option}" for option in ("quick", "keep") if getattr(given, option)]
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--json", *options],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            failed.append(name)
        else:
            found[name] = json.loads(done.stdout)
            if not given.json:
                print(json.dumps({name: found[name]}, indent=1, ensure_ascii=False), flush=True)
    if given.json:
        print(json.dumps(found))
    if given.keep:
        subprocess.run([sys.executable, "-m", "benchmarks.page"], check=True)
    say(f"{time.monotonic() - began:5.0f} s  done" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
