"""The doors over HTTP: `/v1`, an OpenAI-compatible gateway; `/api`, where jobs stand; `/`, the dashboard.

    app                 the routes, what an error looks like, how large a body may be, start and stop
    embeddings          one request's way: key → body → limits → engine or upstream → reply → usage
    cache           keys, models and engines as Postgres has them, at most two seconds old
    database            Postgres, asked beside the event loop
    transfers                corpora in and results out, on threads and connections of their own
    limits              requests and tokens a minute, and what a month may take
    token_ids           OpenAI's token ids, as text
    engines             the way to an engine
    upstreams           the way to a model that another gateway has
    metering            usage rows, written behind the reply
    counting            `/metrics`: requests by route
    asking              who asks `/api`, and which jobs they see
    submissions, jobs   `/api/jobs`: make them, see and steer them, take what came of them
    shapes              how it shows them
    fleet               `/api`: workers, engines, models
    administration      `/api`: usage and keys
    examples            what the OpenAPI description shows
    dashboard/          the same for a person, in a browser

It loads no model.
"""
