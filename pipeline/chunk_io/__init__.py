"""Input and output of chunks: the reader of items, the one transaction that commits results, and the sinks."""
