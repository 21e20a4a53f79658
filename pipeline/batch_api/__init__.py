"""OpenAI's Batch API: input files become jobs, and the jobs' results become output files."""
