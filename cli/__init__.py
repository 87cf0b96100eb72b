"""The ``kvfs`` command line. Imported as ``kvfs.cli``."""
