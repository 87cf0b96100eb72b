"""Fuzzers: what reads bytes of others, fed with anything. hypothesis does it in every run (t1_fuzz), atheris, which is
guided by what the code does with it, by `make fuzz`; the codec's decoder is fuzzed in C (`make fuzz-codec`).
"""
