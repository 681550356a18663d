"""`python -m alphaflow_cli` is `alphaflow`."""

from alphaflow_cli.cli import main

main()
