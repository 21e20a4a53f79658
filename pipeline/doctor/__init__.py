"""Doctor of a deployment: a list of checks from end to end, each a function that yields findings with advice.

    report              the findings of a check
    context             the deployment that is checked, and connections to its parts
    host                checks of this machine: versions, disk space, keys, addresses
    servers             checks of Postgres and Redis
    fleet               checks of the processes, by the rows they write and the replies they give
    access              checks of the login for requests in SQL, and of webhooks
    canary              check of a text's way through a worker, and of its vector
    checks              the list of checks, in order

`pipeline.doctor.healthcheck` is the small counterpart for health checks of containers.
"""
