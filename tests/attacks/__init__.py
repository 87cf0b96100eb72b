"""Hostile input, each piece with the name of the attack. ``python -m tests.attacks FOLDER`` writes all of it as files.

Headers of parts, manifests and other documents of a store, files that daemons derive, frames of the control socket.
What is no bytes (links, FIFOs, devices, swaps) is in t2_hostile_files, what takes time (floods, half frames,
descriptors) in t3_hostile_peers.
"""
