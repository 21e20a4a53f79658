"""Jobs as people see them: control, status, receipts, results, purge and restore."""
