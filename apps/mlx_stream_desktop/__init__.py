"""A window to chat in: streaming replies, saved conversations, a gauge of attended tokens."""
