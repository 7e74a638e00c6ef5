"""Loads the runner that makes one suite of all ranks; it serves plain `python -m pytest` too."""

pytest_plugins = ("mpi_runner",)
