"""What a job is and where it stands. Read in the order of the data's way:

    jobs, errors        nouns, states, the one tree of errors
    settings, logs, metrics       the environment; log lines; every metric's name; exposition: how they are shown
    tables, store/      the schema; every SQL statement, one named function each
    submission → submit           what is asked for, and the job that it comes to; request: what a door is asked for
    sources → plan → staging      a corpus becomes items and chunks
    sql_requests                  the same, asked for in SQL
    publish → rounds → dispatch   chunks become messages, in whose turn; sweep, finish, snapshots
    leases → writeback            a claim, and the one transaction that ends it
    status, results               what came of it
    webhooks                      who is told of it; deadlines: HTTP within a time
    files, batches, batch_results    OpenAI's batch requests: files become jobs, and their ends files
    background                    what the dispatcher does beside its duties: finalize, and more
    standing                      how things stand, as metrics
    catalog, keys                 models and vector spaces; keys to the api
    wire                          OpenAI's shape of requests and replies
    canary, figures     the text that proves a model; numbers as people say them
    spoiled             keys of Redis that others have written to
    doctor/, ready      what is wrong with a deployment; whether a process is ready
    embedded/           servers from wheels, the process tree of `vectormill up`
    cli/, api/          the doors

Workers live in `workers/`; nothing here imports torch.
"""
