"""Devices, processes, files: what turns a recipe into a run."""
