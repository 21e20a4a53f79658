"""SQL statements, one named function each. Functions take a connection; callers own the transaction."""
