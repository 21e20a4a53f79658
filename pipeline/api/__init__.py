"""The door for other programs: `/v1`, an OpenAI-compatible gateway, and `/api`.

    app                 the routes, what an error looks like, start and stop
    embeddings          one request's way: key → body → limits → engine → reply → usage
    directory           keys, models and engines as Postgres has them, at most two seconds old
    limits              requests and tokens a minute, and what a month may take
    engines             the way to an engine
    metering            usage rows, written behind the reply

It loads no model.
"""
