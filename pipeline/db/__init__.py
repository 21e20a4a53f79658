"""Every SQL statement, one named function each. Functions take a connection; callers own the transaction."""
