"""What is kept and what is made again, before anything runs."""
