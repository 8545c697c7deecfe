"""What holds of the values of a program, found by data flow."""
