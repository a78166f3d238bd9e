"""One short module per family, which turns config.json's keys and tensor names into layers."""
