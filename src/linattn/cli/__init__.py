"""The `linattn` command: one verb, one function."""
