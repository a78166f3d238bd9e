"""A chat window: streaming replies, saved conversations, a gauge of attended tokens."""
