"""A deployment examined from end to end: a list of checks, each a function that says what is and what to do.

    report              what a check says
    context             what the checks look at, and with what
    host                this machine: versions, space, keys, addresses
    servers             Postgres and Redis
    fleet               the processes, by what they write down and what they answer
    access              the login of queries asked for in SQL; webhooks
    canary              a text through a worker, and its vector
    checks              the list, in order

`pipeline.doctor.healthcheck` is the small sister for health checks of containers.
"""
