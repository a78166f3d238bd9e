"""Text <-> token ids, chat templates, and ids -> pieces of text; independent of models."""
