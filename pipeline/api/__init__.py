"""The doors over HTTP: `/v1`, an OpenAI-compatible gateway; `/api`, where jobs stand; `/`, the dashboard.

    app                 the routes, what an error looks like, how large a body may be, start and stop
    v1/                 OpenAI's API: embeddings (key → body → limits → engine or upstream → reply → usage), models,
                        files, batches, pagination; token_ids: OpenAI's token ids, as text
    gateway/            what such a request goes through: cache (keys, models and engines as Postgres has them, at most
                        two seconds old), rate_limits, engines, upstreams, metering (usage rows, behind the reply)
    status/             `/api`: jobs and submissions, schemas, fleet, administration (usage and keys)
    dashboard/          the same for a person, in a browser
    dependencies        callers of `/api`, and whose jobs they see
    database            Postgres, asked beside the event loop; transfers: corpora in and results out, on threads
    places, pacing      what workspaces share, and who asks too often waits
    middleware_metrics  `/metrics`: requests by route
    openapi_examples    of the OpenAPI description

It loads no model.
"""
