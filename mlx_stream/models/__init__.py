"""Networks: their layers, families, weights and traced steps; knows no stream and no text."""
