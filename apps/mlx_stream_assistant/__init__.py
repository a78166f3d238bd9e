"""A local assistant that follows files, notes and pipes for days; built on the public API."""
