"""What keeps a store in order, in a daemon or an engine: who holds what, what goes, and who of several may decide."""
