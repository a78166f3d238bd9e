"""One short file per family: config.json's keys and the names of tensors -> layers."""
