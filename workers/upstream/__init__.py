"""The client of a gateway: its encoder, the limits that the fleet shares, what was attempted."""
