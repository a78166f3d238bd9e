"""What a program of its own needs, ours and other people's: paths, locks, ends, escaping."""
