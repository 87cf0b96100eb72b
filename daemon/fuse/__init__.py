"""The two ways to speak FUSE: kvfs' own session on /dev/fuse, and libfuse through mfusepy."""
