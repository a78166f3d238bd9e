"""The steps of a stream: one token, a chunk, or guesses to verify. Layers share one plan."""
