"""Pure nouns and rules: jobs, chunks, options, errors, OpenAI's shapes. No I/O, no SQL."""
