"""Operations on jobs: control, status, receipts, results, purge and restore."""
