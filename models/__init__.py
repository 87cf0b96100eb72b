"""Real models and real texts for tests, demo and benchmarks, from packages on PyPI and files on this machine."""
