"""A local assistant that reads along with files, notes and pipes for days; on the public API."""
