"""What the command line runs: each experiment is a function that writes its results into a folder."""
