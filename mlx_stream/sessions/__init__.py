"""Conversations kept on disk: where they are, who has them open, what was said; knows no model."""
