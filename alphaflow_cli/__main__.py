"""`python -m alphaflow_cli` is `alphaflow`, and `alphaflow` is this: Ctrl-C is heard before the imports begin."""

import os
import signal
from types import FrameType
from typing import NoReturn


def leave(signum: int, frame: FrameType | None) -> NoReturn:
    """End the process at once: nothing has been made yet, so nothing has to be cleaned up."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def main() -> NoReturn:
    """Run the command line; what `python -m alphaflow_cli` and the installed `alphaflow` call."""
    signal.signal(signal.SIGINT, leave)
    try:
        from alphaflow_cli import cli
    except ModuleNotFoundError as fault:
        if (fault.name or "").partition(".")[0] == "alphaflow_cli":
            raise
        raise SystemExit(f"error: {fault.name} is not installed. Run, in alphaflow's folder: pip install .") from None
    cli.run_and_exit()


if __name__ == "__main__":
    main()
