"""A job's Parquet output: part files, their promotion to a data set, and what is read back of them."""
