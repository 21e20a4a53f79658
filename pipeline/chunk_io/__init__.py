"""A chunk's rows in (`reader`), the one transaction that writes them back (`commit`), and where they go (`sinks`)."""
