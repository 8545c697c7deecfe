"""Facts about values, found by data flow; one file a fact."""
