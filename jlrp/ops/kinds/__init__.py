"""The kinds of operations: of each a class with its fields and its mathematics."""
