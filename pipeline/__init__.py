"""The pipeline, from a request for a job to its receipt. The packages, in the order of the data's way:

    core/               pure: jobs, chunks, models, options, errors, OpenAI's shapes
    infra/              settings, logs, metrics, HTTP, storage, leases
    db/                 the schema, its migrations' runner, every SQL statement as a named function
    catalog/            models and vector spaces; keys to the api
    sources/            files, tables and queries become rows, judged
    ingest/             a request becomes a job: options, staging, chunking; the same asked for in SQL; an estimate
    dispatch/           leader, scheduler (fair share), maintenance, completion, background tasks
    broker              messages out, a chunk's address each
    chunk_io/           a claimed chunk is read, and committed to its sink in one transaction
    jobs/               control, status, receipt and its verification, results, purge, restore
    webhooks/           who is told of a job's end, of what, and how
    batch_api/          OpenAI's batch requests: files become jobs, and their ends files
    doctor/             what is wrong with a deployment; a process's health check
    embedded/           servers from wheels, the process tree of `vectormill up`
    cli/, api/          the doors; api/: v1 (OpenAI's), gateway (what that goes through), status, dashboard

Workers live in `workers/`; nothing here imports torch.
"""
