"""The version, alone in a module so that building and `--version` need to import nothing else."""

__version__ = "0.1.0"
