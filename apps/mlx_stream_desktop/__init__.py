"""A window to talk in: streaming replies, saved conversations, a gauge of what is attended."""
