"""The daemon: keeper and worker processes, the filesystem view and the control socket. Imported as ``kvfs.daemon``."""
