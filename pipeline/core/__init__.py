"""Domain types and rules: jobs, chunks, options, errors, OpenAI's wire format. Pure: no I/O, no SQL."""
