"""The dispatcher: its leader tells workers of chunks in whose turn it is, sweeps, ends jobs, and does the rest."""
