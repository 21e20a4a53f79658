"""Webhooks: whom they may tell (`allowlist`), of what (`events`), and how it is sent (`delivery`)."""
