"""What is made of a finished run: its report."""
