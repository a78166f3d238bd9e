"""Token ids in, token ids out: streams, guesses, snapshots, completions; independent of turns."""
