"""A local assistant that follows files, notes and pipes for days; on the public API."""
