"""Tools for programs, both ours and others': paths, locks, clean exits, escaping, SQLite."""
