"""Benchmarks: kvfs beside no cache, the engine's own prefix cache, and the other connectors that outlive a process."""
