"""Steps of a request for embeddings: cached keys and models, rate limits, engines or upstreams, metering."""
