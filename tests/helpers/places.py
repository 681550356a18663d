"""Where the repository is, seen from the tests."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
