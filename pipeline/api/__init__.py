"""HTTP interfaces: `/v1`, an OpenAI-compatible gateway; `/api`, the status API; `/`, the dashboard.

    app                 routes, error responses, limits on bodies, startup and shutdown
    v1/                 OpenAI's API: embeddings (key → body → limits → engine or upstream → reply → usage), models,
                        files, batches, pagination; token_ids decodes OpenAI's token ids to text
    gateway/            steps of such a request: cache (keys, models and engines from Postgres, at most two seconds
                        old), rate_limits, engines, upstreams, metering (usage rows, written after the reply)
    status/             `/api`: jobs and submissions with their schemas, workers, models, usage, keys
    dashboard/          the same for people, in a browser
    dependencies        authentication of `/api`'s callers, and the scope of the jobs they see
    database            Postgres queries off the event loop
    transfers           uploads of corpora and downloads of results, on threads of their own
    fair_semaphore      concurrency limits shared by workspaces
    pacing              rate limits by delay
    methods, paths      HEAD, OPTIONS and CORS; path normalisation
    packing             decompression of request bodies
    readiness           `/readyz`
    middleware_metrics  `/metrics`: requests by route
    openapi_examples    examples for the OpenAPI description

It loads no model.
"""
