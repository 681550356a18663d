"""`python -m alphaflow_cli` is `alphaflow`."""

try:
    from alphaflow_cli.cli import main
except ModuleNotFoundError as fault:
    if (fault.name or "").partition(".")[0] == "alphaflow_cli":
        raise
    raise SystemExit(f"error: {fault.name} is not installed. Run, in alphaflow's folder: pip install -e .") from None

main()
