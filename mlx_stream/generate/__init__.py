"""Token ids in, token ids out: streams, guesses, snapshots, completions; knows no turns."""
