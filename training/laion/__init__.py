"""From a subset's metadata to a locked data set: select, download, dedup, card, report."""
