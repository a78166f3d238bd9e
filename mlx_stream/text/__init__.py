"""Text <-> token ids, chat templates, and ids -> pieces of text; knows no model."""
