"""The program, and what is known of primitives."""
