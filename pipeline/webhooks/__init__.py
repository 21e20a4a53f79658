"""Webhooks: allowed addresses (`allowlist`), events (`events`), and signed delivery (`delivery`)."""
