"""Tools for programs, ours and other people's: paths, locks, clean exits, escaping, SQLite."""
