"""Client of an upstream: an encoder, with limits that the fleet shares and a record of each attempt."""
