"""The `tollway` command's first step: says what to install where only the thin SDK is there."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from tollway.streams.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"tollway: the command needs {error.name}: pip install 'tollway[pipeline]', or 'tollway[embedded]' for a laptop"
        )
    run()
