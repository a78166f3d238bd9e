"""How a stream reads: one token, a chunk, verified guesses; each plans once what layers share."""
