"""The sequence mixers, one folder each; every one is a State and four functions (docs/architecture.md, section 1)."""
