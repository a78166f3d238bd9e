"""One short file a family: config.json's words and the names of its tensors -> layers."""
